"""The registry of merge methods, and what a method's signature says about its parameters."""

from __future__ import annotations

import importlib
import inspect
import keyword
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, get_origin, get_type_hints

from seme import dtypes
from seme.errors import ConfigError, brief
from seme.methods._passes import Group, Merge
from seme.methods._weights import check_finite

if TYPE_CHECKING:
    import torch

    from seme.roles import TensorRole

PerModel = Annotated[list[float], "model"]
"""A float for every input, the base included."""

PerExpert = Annotated[list[float], "expert"]
"""A float for every input but the base."""

Scope = Literal["shared", "model", "expert"]
Base = Literal["required", "optional", "input"]
Check = Callable[[Group, Mapping[str, Any]], None]
Unit = Callable[[tuple[int, ...], Mapping[str, Any]], int]
Function = TypeVar("Function", bound=Callable[..., "Merge | None"])


class Among(NamedTuple):
    """The values a parameter may have, in words and as a test; written ``Annotated[float, FRACTION]``."""

    words: str
    holds: Callable[[Any], bool]


FRACTION = Among("a number from 0 to 1", lambda value: 0 <= value <= 1)
AT_LEAST_0 = Among("at least 0", lambda value: value >= 0)


@dataclass(frozen=True)
class Param:
    """One parameter of a method: its name in recipes, type, scope, default (None: required), description, values."""

    name: str
    kind: type
    scope: Scope
    default: Any
    doc: str
    among: Among | None = None

    @property
    def required(self) -> bool:
        """True if a recipe must give it."""
        return self.default is None

    @property
    def key(self) -> str:
        """Its name in Python: ``lambda`` is ``lambda_``."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name

    def convert(self, value: Any, where: str) -> Any:
        """A written value in the parameter's type; :class:`ConfigError` if it is none the parameter may have."""
        from seme.config import convert

        found = convert(value, self.kind, where)
        if self.among is not None and not self.among.holds(found):
            raise ConfigError(f"{where}: {brief(found)}; expected {self.among.words}")
        return found


@dataclass(frozen=True)
class Method:
    """A registered merge method.

    Attributes:
        name: its name in recipes.
        merge: the generator of passes, see :mod:`seme.methods._passes`; of a matrix method a plain function on a
            stack, see :mod:`seme.methods._matrix`.
        reference: the same in float64 torch, as the paper writes it.
        params: read from the signature of ``merge``.
        base: ``required``; ``optional``: task vectors are merged where there is one, else the models; or ``input``: a
            configured base model is one more input.
        min_inputs, max_inputs: how many models it takes, the base included, but where it is optional; None: no limit.
        summary: first line of the docstring of its module.
        source: paper or page.
        matrix: it works on whole matrices.
        unit: ``unit(shape, arguments)``: elements of a tensor that a pass must have in memory together, such as a
            row's; None if any piece will do.
        check: ``check(group, arguments)`` raises :class:`ConfigError` for arguments that do not go together.
        describe: (matrix methods) what is done with a tensor: ``describe(role, shape, arguments)``.
        workspace: (matrix methods) bytes it holds for a tensor: ``workspace(role, shape, experts, arguments)``.
        uses_bases: (matrix methods) whether arguments of a tensor ask for the base model's semantic bases.
        whole: (matrix methods) merges all tensors together, where :attr:`asks_for_whole` says so of the arguments:
            ``whole(checkpoints, arguments, emit, data_free) -> report``, the base's checkpoint first; see
            :func:`seme.methods.seme.merge_whole`.
        asks_for_whole: of the arguments of all tensors by name; raises :class:`ConfigError` if they contradict.
    """

    name: str
    merge: Callable[..., Any]
    reference: Callable[..., torch.Tensor]
    params: tuple[Param, ...]
    base: Base
    min_inputs: int
    max_inputs: int | None
    summary: str
    source: str
    unit: Unit | None = None
    matrix: bool = False
    check: Check | None = None
    describe: Callable[[TensorRole, tuple[int, ...], Mapping[str, Any]], str] | None = None
    workspace: Callable[[TensorRole, tuple[int, ...], int, Mapping[str, Any]], int] | None = None
    uses_bases: Callable[[Mapping[str, Any]], bool] | None = None
    whole: Callable[..., dict[str, Any]] | None = None
    asks_for_whole: Callable[[Mapping[str, Mapping[str, Any]]], bool] = lambda arguments: False

    def check_inputs(self, count: int, base: bool = True, where: str = "models") -> None:
        """:class:`ConfigError`, which begins with ``where``, if the method does not take that many models, ``base``
        being one of them or not."""
        least, most = self.min_inputs, self.max_inputs
        counted = "base included"
        if self.base == "optional":
            count, counted = count - base, "base not included"
        if count < least or (most is not None and count > most):
            takes = f"{least} or more" if most is None else str(least) if most == least else f"{least} to {most}"
            models = "model" if takes == "1" else "models"
            raise ConfigError(f"{where}: {self.name} takes {takes} {models}, {counted}; found {count}")

    def check_arguments(self, group: Group, arguments: Mapping[str, Any]) -> None:
        """:class:`ConfigError` if a tensor cannot be merged with these arguments."""
        held = dtypes.arithmetic(group.compute_dtype)
        for param in self.params:
            if param.kind is float:
                values = arguments[param.key]
                check_finite(group, param.name, values if isinstance(values, list) else [values], held)
        if self.check is not None:
            self.check(group, arguments)

    def param(self, name: str) -> Param | None:
        """The parameter of that name, if the method has it."""
        return next((p for p in self.params if p.name == name), None)


def _docs(function: Callable[..., Any]) -> dict[str, str]:
    """Descriptions under ``Args:`` of a Google-style docstring."""
    found: dict[str, str] = {}
    current = None
    lines = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")[2].splitlines()
    for line in lines:
        if line and not line.startswith(" "):
            break
        body = line.strip()
        if line.startswith("    ") and not line.startswith("     ") and ":" in body:
            current, _, text = body.partition(":")
            found[current] = text.strip()
        elif current and body:
            found[current] += " " + body
    return found


def _params(function: Callable[..., Any]) -> tuple[Param, ...]:
    hints = get_type_hints(function, include_extras=True)
    docs = _docs(function)
    params = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints[name]
        scope: Scope = "shared"
        kind: Any = hint
        among = None
        if get_origin(hint) is Annotated:
            kind = hint.__origin__
            for said in hint.__metadata__:
                if isinstance(said, Among):
                    among = said
                else:
                    scope, kind = said, float
        if kind not in (bool, int, float, str):
            raise TypeError(f"parameter {name}: {hint} is not bool, int, float, str, PerModel or PerExpert")
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        public = name.rstrip("_")
        if public not in docs and name not in docs:
            raise TypeError(f"parameter {name} is not described under Args")
        params.append(Param(public, kind, scope, default, docs.get(public) or docs[name], among))
    return tuple(params)


def method(
    name: str,
    *,
    reference: Callable[..., torch.Tensor],
    source: str,
    base: Base = "required",
    min_inputs: int = 1,
    max_inputs: int | None = None,
    unit: Unit | None = None,
    matrix: bool = False,
    check: Check | None = None,
    describe: Callable[[TensorRole, tuple[int, ...], Mapping[str, Any]], str] | None = None,
    workspace: Callable[[TensorRole, tuple[int, ...], int, Mapping[str, Any]], int] | None = None,
    uses_bases: Callable[[Mapping[str, Any]], bool] | None = None,
    whole: Callable[..., dict[str, Any]] | None = None,
    asks_for_whole: Callable[[Mapping[str, Mapping[str, Any]]], bool] = lambda arguments: False,
) -> Callable[[Function], Function]:
    """Register the decorated generator (of a matrix method: function) as a merge method. Its keyword parameters are
    the recipe's parameters; the other arguments are described at :class:`Method`.

    A trailing underscore of a parameter's name is dropped in recipes (``lambda_`` is ``lambda``).
    """

    def register(function: Function) -> Function:
        if name in _METHODS:
            raise ConfigError(f"merge method {name!r} is registered twice")
        module = inspect.getmodule(function)
        summary = inspect.cleandoc((module.__doc__ if module else None) or "").partition("\n")[0]
        _METHODS[name] = Method(
            name,
            function,
            reference,
            _params(function),
            base,
            min_inputs,
            max_inputs,
            summary,
            source,
            unit,
            matrix,
            check,
            describe,
            workspace,
            uses_bases,
            whole,
            asks_for_whole,
        )
        return function

    return register


_METHODS: dict[str, Method] = {}
_discovered = False


def methods() -> dict[str, Method]:
    """All merge methods by name: seme's own and those of the entry point group ``seme.methods``."""
    global _discovered
    if not _discovered:
        _discovered = True
        import seme.methods

        for info in pkgutil.iter_modules(seme.methods.__path__):
            if not info.name.startswith("_"):
                importlib.import_module(f"seme.methods.{info.name}")
        for point in entry_points(group="seme.methods"):
            try:
                point.load()
            except Exception as e:
                warnings.warn(f"seme: merge method {point.name} of {point.value} is left out: {e}", stacklevel=2)
    return dict(sorted(_METHODS.items()))


def get(name: str) -> Method:
    """The method of that name; :class:`ConfigError` with the nearest name if there is none."""
    from seme.config import suggest

    known = methods()
    if name not in known:
        raise ConfigError(f"merge_method: unknown method {name!r}{suggest(name, known)}")
    return known[name]
