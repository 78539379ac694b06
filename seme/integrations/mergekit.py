"""seme's methods inside mergekit 0.1.5 and what is built on it, such as sentence-transformers' ``merge``.

:func:`install` registers the methods that mergekit lacks, ``seme`` first of all, and puts seme's kernels behind the
names of those it has. Those keep mergekit's parameters, defaults and input contracts, and give mergekit's values as
``compat: mergekit`` does; what they cannot compute (another dtype or device, gradients to be recorded, parameters that
seme refuses) is left to mergekit's own implementation. mergekit goes on reading, planning and writing.

``seme-mergekit-yaml`` is ``mergekit-yaml`` with :func:`install` before it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seme import dtypes, native
from seme.errors import ConfigError
from seme.methods import Method, methods

try:
    import mergekit.merge_methods as _mergekit
    from mergekit.merge_methods import registry as _registry
    from mergekit.merge_methods.base import MISSING, ParameterSpec
except ImportError as e:
    raise ImportError(f"mergekit >= 0.1.5 is needed, and cannot be imported ({e}): pip install 'seme[mergekit]'") from e

if TYPE_CHECKING:
    import torch

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
"""Methods whose masks depend on torch's global generator in mergekit; here each tensor draws its seed from it."""


def install() -> tuple[str, ...]:
    """Register what mergekit lacks, and replace what seme computes faster; a second call changes nothing.

    Methods are replaced only where the C++ kernels are there.

    Returns:
        The names of all methods of mergekit's registry that seme computes now.
    """
    known = _registry._METHODS
    for name, method in methods().items():
        if name not in known:
            _mergekit.register(_Own(method))
        elif not isinstance(known[name], (_Own, _Fast)) and native.why_not("_C") is None:
            known[name] = _Fast(method, known[name])
    return tuple(name for name, found in known.items() if isinstance(found, (_Own, _Fast)))


def uninstall() -> None:
    """Make mergekit's registry what it was."""
    known = _registry._METHODS
    for name, found in list(known.items()):
        if isinstance(found, _Fast):
            known[name] = found.original
        elif isinstance(found, _Own):
            del known[name]


def main() -> None:
    """``seme-mergekit-yaml``: the arguments of ``mergekit-yaml``."""
    try:
        from mergekit.scripts.run_yaml import main as run_yaml

        install()
    except ImportError as e:
        sys.exit(f"seme-mergekit-yaml: {e}")
    run_yaml(prog_name="seme-mergekit-yaml")


def _parameters(group: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Bound parameters as :func:`seme.merge_state_dicts` takes them, per-input values in the order of their inputs."""
    entries = {entry.id for entry in group.entries}
    found = {}
    for name, value in parameters.items():
        listed = isinstance(value, Mapping) and set(value) <= entries
        found[name] = list(value.values()) if listed else value
    return found


def _drawn_seed() -> int:
    import torch

    return int(torch.randint(0, 2**63 - 1, ()).item())


def _base(group: Any) -> int | None:
    return next((i for i, entry in enumerate(group.entries) if entry.is_base), None)


class _Fast(_mergekit.GroupMergeMethod):
    """seme's implementation of a method that mergekit has."""

    def __init__(self, method: Method, original: Any) -> None:
        self.method = method
        self.original = original
        self.spec = original.spec

    def merge_group(self, group: Any, /, **parameters: Any) -> torch.Tensor:
        """One tensor; mergekit has cast the inputs to the working dtype."""
        from seme.state_dicts import merge_state_dicts

        if not self._computes(group):
            return self._original(group, parameters)
        name = group.metadata.name or "tensor"
        try:
            return merge_state_dicts(
                [{name: tensor} for tensor in group.tensors],
                self.method.name,
                base=_base(group),
                parameters=_parameters(group, parameters),
                compat="mergekit",
                seed=_drawn_seed() if self.method.name in RANDOM else 0,
            )[name]
        except ConfigError:
            return self._original(group, parameters)  # a value that mergekit allows, or its own words on why not

    def _computes(self, group: Any) -> bool:
        import torch

        for tensor in group.tensors:
            kind = dtypes.from_torch(tensor.dtype)
            if not kind.mergeable or tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
                return False
            if tensor.requires_grad and torch.is_grad_enabled():
                return False
        return bool(group.tensors)

    def _original(self, group: Any, parameters: Mapping[str, Any]) -> torch.Tensor:
        (result,) = self.original._execute_resolved((group,), [dict(parameters)])
        found: torch.Tensor = result
        return found


class _Own(_mergekit.MergeMethod):
    """A method of seme's that mergekit does not have."""

    def __init__(self, method: Method) -> None:
        self.method = method
        required = method.base == "required"
        policy = _mergekit.BasePolicy.REQUIRED if required else _mergekit.BasePolicy.IGNORED
        scopes = {
            "shared": _mergekit.ParameterScope.SHARED,
            "model": _mergekit.ParameterScope.INPUT,
            "expert": _mergekit.ParameterScope.NON_BASE,
        }
        self.spec = _mergekit.MergeMethodSpec(
            name=method.name,
            pretty_name=method.name,
            reference_url=method.source,
            contract=_mergekit.InputContract(
                base=policy, min_inputs=max(1, method.min_inputs), max_inputs=method.max_inputs
            ),
            parameters=[
                ParameterSpec(
                    name=p.name,
                    value_type=p.kind,
                    scope=scopes[p.scope],
                    default=MISSING if p.required else p.default,
                    description=p.doc,
                )
                for p in method.params
            ],
        )

    def _execute(
        self,
        groups: Sequence[Any],
        parameters: list[dict[str, Any]],
        options: Any,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """All tensors that come in one call, so that what each is to the model is known from all of them.

        mergekit's own executor brings one tensor at a time; the others are then seen in the header of the base model.
        """
        from mergekit.merge_methods.dtype import align_dtype

        from seme.state_dicts import merge_state_dicts

        names = [group.metadata.name or str(i) for i, group in enumerate(groups)]
        if len(set(names)) < len(names):
            names = [str(i) for i in range(len(groups))]
        aligned = [align_dtype(group, dtype) for group, dtype in zip(groups, input_dtypes)]
        shapes = {name: tuple(group.tensors[0].shape) for name, group in zip(names, aligned)}
        config: Mapping[str, Any] | None = None
        if len(groups) == 1:
            config, listed = _model_of(groups[0])
            shapes = {**listed, **shapes}
        merged: dict[str, torch.Tensor] = {}
        given = [_parameters(group, p) for group, p in zip(aligned, parameters)]
        for i, own in enumerate(given):
            if names[i] in merged:
                continue
            chosen = [j for j in range(len(groups)) if given[j] == own]
            merged |= merge_state_dicts(
                [{names[j]: aligned[j].tensors[m] for j in chosen} for m in range(len(aligned[i].entries))],
                self.method.name,
                base=_base(aligned[i]),
                parameters=own,
                out_dtype=out_dtype,
                config=config,
                shapes=shapes,
            )
        return tuple(merged[name] for name in names)


def _model_of(group: Any) -> tuple[Mapping[str, Any] | None, Mapping[str, tuple[int, ...]]]:
    """Contents of config.json, and the shapes of all tensors, of the model that a group's base belongs to.

    Nothing is known of the models of a group that was made from tensors.
    """
    from mergekit.common import ModelReference
    from mergekit.io.tasks import LoaderCache

    model = (group.base or group.entries[0]).id
    if not isinstance(model, ModelReference):
        return None, {}
    return _header(str(LoaderCache().get(model).index.base_path))


@functools.lru_cache(maxsize=8)
def _header(folder: str) -> tuple[Mapping[str, Any], Mapping[str, tuple[int, ...]]]:
    from seme.checkpoint import Checkpoint

    with Checkpoint(Path(folder)) as checkpoint:
        return checkpoint.config, {name: stored.shape for name, stored in checkpoint.tensors.items()}
