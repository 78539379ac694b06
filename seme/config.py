"""The recipe: mergekit's YAML schema, read into frozen dataclasses, every mistake named by its path in the file.

:data:`KEYS` are the supported ones. A key that is not known is an error, with the nearest known one.

Whatever way it is written, a recipe is a list of sections (modules of the model, or all of it), each of them a list of
slices (ranges of layers, or all of them), each of them a list of entries, the inputs.

A parameter value is a scalar, a gradient (a list of scalars, interpolated over the layers), or a list of
``{filter, value}`` conditions of which the first whose filter is part of the tensor's name holds.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seme import dtypes
from seme.checkpoint.chat import AUTO, TEMPLATES
from seme.checkpoint.hub import ModelRef, identity, local_path
from seme.dtypes import DType
from seme.errors import ConfigError, brief, cannot_read

if TYPE_CHECKING:
    from seme.roles import Override

Scalar = bool | int | float | str

MAX_BYTES = 1 << 20
"""Bytes of a recipe that are accepted: YAML is read at some hundred kilobytes a second."""

MAX_LAYERS = 10**6

KEYS = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "base_model",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "compat",
    "seed",
    "roles",
)


@dataclass(frozen=True)
class Condition:
    """One ``{filter, value}`` entry; ``filter`` None or ``*`` matches every tensor."""

    filter: str | None
    value: Scalar | tuple[Scalar, ...]

    def matches(self, tensor: str) -> bool:
        """True if the filter is a substring of the tensor's name."""
        return self.filter is None or self.filter == "*" or self.filter in tensor


Value = Scalar | tuple[Scalar, ...] | tuple[Condition, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter as written, with the path of its entry for messages."""

    value: Value
    where: str

    def scalars(self) -> Iterator[Scalar]:
        """Every value in it, of all conditions and anchors."""
        for part in self.value if isinstance(self.value, tuple) else (self.value,):
            value = part.value if isinstance(part, Condition) else part
            yield from value if isinstance(value, tuple) else (value,)

    def at(self, tensor: str, t: float, kind: type) -> Scalar | None:
        """The value for one tensor at relative depth ``t`` in [0, 1]; None if no condition matches.

        Raises:
            ConfigError: a value is not of type ``kind``.
        """
        value: Any = self.value
        if isinstance(value, tuple) and value and isinstance(value[0], Condition):
            value = next((c.value for c in value if c.matches(tensor)), ())
        if isinstance(value, tuple):
            anchors = tuple(convert(v, kind, self.where) for v in value)
            return interpolate(anchors, t) if anchors else None
        return convert(value, kind, self.where)


def interpolate(values: tuple[Scalar, ...], t: float) -> Scalar:
    """A gradient at relative depth ``t``: linear between the two nearest anchors; steps if any is a bool or string."""
    last = len(values) - 1
    if any(isinstance(v, (bool, str)) for v in values):
        return values[int(t * last)]
    s = t * last
    low = int(s)
    high = min(last, low + 1)
    fraction = s - low
    return (1 - fraction) * float(values[low]) + fraction * float(values[high])


Parameters = Mapping[str, Parameter]


@dataclass(frozen=True)
class ModelEntry:
    """One entry of ``models`` or of a slice's ``sources``: the model, the parameters written under it, the place in the
    recipe, and of a source the range of layers."""

    ref: ModelRef
    parameters: Parameters
    where: str = ""
    layers: range | None = None


@dataclass(frozen=True)
class Slice:
    """Layers of the output that are merged from as many layers of each entry; all layers if it comes from ``models``.

    Attributes:
        entries: the inputs.
        base_model: the slice's own.
        parameters: of the slice.
        where: its place in the recipe.
    """

    entries: tuple[ModelEntry, ...]
    base_model: ModelRef | None
    parameters: Parameters
    where: str


@dataclass(frozen=True)
class Section:
    """A module of the model, or all of it.

    Attributes:
        module: its name; None: the whole model.
        slices: what it is put together from, in order.
        parameters: of the module.
        where: its place in the recipe.
    """

    module: str | None
    slices: tuple[Slice, ...]
    parameters: Parameters
    where: str

    @property
    def sliced(self) -> bool:
        """True if the recipe says which layers to take."""
        return self.slices[0].entries[0].layers is not None


@dataclass(frozen=True)
class TokenRule:
    """An entry of ``tokenizer.tokens``: the row of a token in models that lack it, with ``force`` in all of them.

    Attributes:
        decides: it says which row; otherwise the token is only added.
        model: whose row; None: zeros.
        token: which token of that model, or its id; None: the token itself.
        force: in all models.
        where: its place in the recipe.
    """

    decides: bool
    model: ModelRef | None
    token: str | int | None
    force: bool
    where: str


@dataclass(frozen=True)
class TokenizerConfig:
    """``tokenizer`` or ``tokenizer_source``.

    Attributes:
        source: the model whose tokens the output has; None: those of all models (``union``).
        tokens: by token, what its row is.
        pad_to_multiple_of: of which number the rows are a multiple.
        where: place of the source in the recipe.
    """

    source: ModelRef | None
    tokens: Mapping[str, TokenRule]
    pad_to_multiple_of: int
    where: str


@dataclass(frozen=True)
class MergeConfig:
    """A recipe. ``source`` is its text, kept for the model card; ``compat`` is None or ``mergekit``; ``seed`` is that
    of methods that draw random numbers; ``roles`` overrule what matrix methods take a tensor for."""

    merge_method: str
    sections: tuple[Section, ...]
    base_model: ModelRef | None
    parameters: Mapping[str, Parameter]
    dtype: DType | None
    out_dtype: DType | None
    tokenizer: TokenizerConfig | None
    chat_template: str | None
    compat: str | None
    source: str
    seed: int = 0
    roles: tuple[Override, ...] = ()

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The slices of all sections."""
        return tuple(s for section in self.sections for s in section.slices)

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """The entries of all slices."""
        return tuple(entry for s in self.slices for entry in s.entries)


def suggest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'density'?`` or the list of what is known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def load(config: Mapping[str, Any] | str | Path) -> MergeConfig:
    """Read a recipe from a mapping, a YAML file, or YAML text (a string with a line break or a colon).

    Raises:
        ConfigError: anything wrong with it; the message begins with the place.
    """
    if isinstance(config, (list, tuple)):
        raise ConfigError(f"recipe: {brief(config)}; expected a mapping, the path of a YAML file, or YAML text")
    found = documents(config)
    if len(found) > 1:
        raise ConfigError(f"recipe: {len(found)} documents, one recipe each; expected one")
    return parse(*found[0])


def documents(config: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | Path) -> list[tuple[dict[str, Any], str]]:
    """The documents of a YAML file or text, mostly one, as mappings with their text.

    Args:
        config: as for :func:`load`, or a list of mappings.

    Raises:
        ConfigError: what is no YAML, or no mapping.
    """
    import yaml

    if isinstance(config, (Mapping, list, tuple)):
        try:
            made: dict[int, tuple[Any, Any]] = {}
            given = [_plain(c, made) for c in ([config] if isinstance(config, Mapping) else config)]
        except RecursionError:
            raise ConfigError("recipe: nested too deep, perhaps in itself") from None
        name, text, single = "recipe", "", False
    elif isinstance(config, (str, os.PathLike)):
        name, text = _read(config)
        try:
            given = list(yaml.load_all(text, Loader=_unique_loader()))
        except Exception as e:  # besides YAMLError whatever int(), datetime() and the like say to a malformed scalar
            mark = getattr(e, "problem_mark", None)
            place = f":{mark.line + 1}" if mark else ""
            reason = getattr(e, "problem", None) or str(e).partition("\n")[0][:200] or type(e).__name__
            raise ConfigError(f"{name}{place}: not valid YAML: {reason}") from e
        given = [d for d in given if d is not None] or [None]
        single = len(given) == 1
    else:
        raise ConfigError(f"recipe: {brief(config)}; expected a mapping, the path of a YAML file, or YAML text")
    for data in given or [None]:
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"{name}: a recipe is a mapping with merge_method and models, found {type(data).__name__}"
            )
    try:
        return [(data, text if single else yaml.safe_dump(data, sort_keys=False)) for data in given]
    except RecursionError:
        raise ConfigError(f"{name}: nested too deep") from None


def _read(config: str | os.PathLike[str]) -> tuple[str, str]:
    """A recipe's text, and what to call it in messages."""
    text = str(config)
    is_file = not isinstance(config, str) or ("\n" not in text and (local_path(text) is not None or ": " not in text))
    if not is_file:
        return "recipe", text
    try:
        with Path(config).expanduser().open("rb") as f:
            raw = f.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{text[:300]}: more than {MAX_BYTES} bytes; no recipe is so long")
        return text, raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        raise ConfigError(f"{config}: recipe is not UTF-8 text; save it as such") from e
    except OSError as e:
        raise ConfigError(f"{text[:300]}: recipe {cannot_read(e)}") from e
    except (ValueError, RuntimeError) as e:  # a NUL in it, no such user
        raise ConfigError(f"{text[:300]}: recipe cannot be read: {e}; correct the path") from e


def with_models(config: MergeConfig, models: Mapping[str, ModelRef], source: str) -> MergeConfig:
    """A recipe with other models in the place of some that it names, and another text."""

    def at(ref: ModelRef | None) -> Any:
        found = models.get(ref.path) if ref is not None and ref.revision is None else None
        return ref if found is None or ref is None else found._replace(lora=ref.lora)

    sections = tuple(
        replace(
            section,
            slices=tuple(
                replace(
                    part,
                    entries=tuple(replace(e, ref=at(e.ref)) for e in part.entries),
                    base_model=at(part.base_model),
                )
                for part in section.slices
            ),
        )
        for section in config.sections
    )
    tokenizer = config.tokenizer
    if tokenizer is not None:
        tokens = {token: replace(rule, model=at(rule.model)) for token, rule in tokenizer.tokens.items()}
        tokenizer = replace(tokenizer, source=at(tokenizer.source), tokens=tokens)
    return replace(config, sections=sections, base_model=at(config.base_model), tokenizer=tokenizer, source=source)


def _plain(value: Any, made: dict[int, tuple[Any, Any]]) -> Any:
    """A recipe given as Python objects, in the types that YAML gives: paths are text, tuples are lists.

    ``made`` has mappings and lists, and what they became, by their identity: aliases of aliases would be copied for
    ever.
    """
    if isinstance(value, (Mapping, list, tuple)):
        if id(value) not in made:
            found: Any
            if isinstance(value, Mapping):
                found = {_plain(k, made): _plain(v, made) for k, v in value.items()}
            else:
                found = [_plain(v, made) for v in value]
            made[id(value)] = value, found
        return made[id(value)][1]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):  # without the subclasses of numpy and enum, which YAML does not write
        if isinstance(value, kind):
            return kind(value)
    raise ConfigError(f"recipe: {brief(value)}: a recipe holds mappings, lists, numbers, true/false and text")


def _unique_loader() -> Any:
    """A safe YAML loader that refuses a key given twice.

    It is the one in Python: the one in C crashes on deep nesting, where this one raises RecursionError.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def __init__(self, stream: Any) -> None:
            super().__init__(stream)
            self._checked: set[int] = set()

        def flatten_mapping(self, node: Any) -> None:
            # Called before the pairs of '<<' are put into the node; those may repeat a key.
            if id(node) not in self._checked:
                self._checked.add(id(node))
                keys = [k for k, _ in node.value if k.tag != "tag:yaml.org,2002:merge"]
                seen: set[str] = set()
                for key in keys:
                    if isinstance(key, yaml.ScalarNode):
                        if key.value in seen:
                            problem = f"key {key.value!r} is given twice"
                            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                        seen.add(key.value)
            super().flatten_mapping(node)
            # The last of equal keys holds. Without the others, merges of merges do not grow with every level, as they
            # do in PyYAML before 6.0.4.
            last = {(k.tag, k.value) if isinstance(k, yaml.ScalarNode) else id(k): (k, v) for k, v in node.value}
            node.value = list(last.values())

    return Loader


def parse(data: Mapping[str, Any], source: str) -> MergeConfig:
    """A recipe from one of :func:`documents`.

    Raises:
        ConfigError: the first mistake.
    """
    try:
        return _parse(data, source)
    except RecursionError:
        raise ConfigError("recipe: nested too deep, perhaps in itself") from None


def _parse(data: Mapping[str, Any], source: str) -> MergeConfig:
    from seme.roles import parse as parse_roles  # which reports mistakes with suggest()

    _check_keys(data, KEYS, "")
    method = data.get("merge_method")
    if not isinstance(method, str):
        raise ConfigError("merge_method: missing; name a method, e.g. task_arithmetic ('seme methods' lists them)")
    sections = _sections(data)
    base = _ref(data["base_model"], "base_model") if data.get("base_model") is not None else None
    compat = data.get("compat")
    if compat not in (None, "mergekit"):
        raise ConfigError(f"compat: {brief(compat)}; the only value is 'mergekit'")
    return MergeConfig(
        merge_method=method,
        sections=sections,
        base_model=base,
        parameters=_parameters(data.get("parameters"), "parameters"),
        dtype=_dtype(data.get("dtype"), "dtype"),
        out_dtype=_dtype(data.get("out_dtype"), "out_dtype"),
        tokenizer=_tokenizer(data, base or sections[0].slices[0].entries[0].ref),
        chat_template=_chat_template(data.get("chat_template")),
        compat=compat,
        source=source,
        seed=_seed(data.get("seed")),
        roles=parse_roles(data.get("roles")),
    )


def _seed(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise ConfigError(f"seed: {brief(value)}; expected a whole number from 0 to 2^64 - 1")
    return value


def override(config: MergeConfig, **keys: Any) -> MergeConfig:
    """The recipe with other values of top-level keys, such as ``seed``; those that are None stay as they are.

    Raises:
        ConfigError: a value is not one of the key's.
    """
    import yaml

    given = {k: v for k, v in keys.items() if v is not None}
    if not given:
        return config
    data = {**yaml.load(config.source, Loader=_unique_loader()), **given}
    return parse(data, yaml.safe_dump(data, sort_keys=False))


def _name(key: Any) -> str:
    """A key as messages show it; YAML's may be numbers and dates as well."""
    return key[:100] if isinstance(key, str) else brief(key)


def _check_keys(mapping: Mapping[Any, Any], known: tuple[str, ...], prefix: str) -> None:
    for key in mapping:
        if key not in known:
            raise ConfigError(f"{prefix}{_name(key)}: unknown key{suggest(_name(key), known)}")


def _sections(data: Mapping[str, Any]) -> tuple[Section, ...]:
    """``models``, ``slices`` or ``modules``, whichever the recipe has."""
    modules = data.get("modules")
    given = [k for k in ("models", "slices", "modules") if data.get(k) not in (None, [], {})]
    if len(given) > 1:
        raise ConfigError(f"{given[1]}: {given[0]} is given too; write one of models, slices and modules")
    if given != ["modules"]:
        return (Section(None, _slices(data, ""), {}, given[0] if given else "models"),)
    if not isinstance(modules, Mapping):
        raise ConfigError(f"modules: {brief(modules)}; expected a mapping {{NAME: {{models: [...]}}}}")
    found = []
    for name, value in modules.items():
        where = f"modules.{_name(name)}"
        if not isinstance(name, str) or not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected {{models: [...]}} or {{slices: [...]}}, found {brief(value)}")
        _check_keys(value, ("models", "slices", "parameters"), f"{where}.")
        if value.get("models") and value.get("slices"):
            raise ConfigError(f"{where}.slices: models is given too; write one of them")
        parameters = _parameters(value.get("parameters"), f"{where}.parameters")
        found.append(Section(name, _slices(value, f"{where}."), parameters, where))
    return tuple(found)


def _slices(data: Mapping[str, Any], prefix: str) -> tuple[Slice, ...]:
    """The slices under ``slices``, or the one that ``models`` are."""
    listed = data.get("slices")
    if listed in (None, []):
        return (Slice(_entries(data.get("models"), f"{prefix}models", sliced=False), None, {}, f"{prefix}models"),)
    if not isinstance(listed, list):
        raise ConfigError(f"{prefix}slices: {brief(listed)}; expected a list of {{sources: [...]}}")
    found = []
    for i, value in enumerate(listed):
        where = f"{prefix}slices[{i}]"
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected {{sources: [...]}}, found {brief(value)}")
        _check_keys(value, ("sources", "base_model", "residual_weight", "parameters"), f"{where}.")
        if value.get("residual_weight") is not None:
            raise ConfigError(f"{where}.residual_weight: no method has a use for it, nor has mergekit; leave it out")
        entries = _entries(value.get("sources"), f"{where}.sources", sliced=True)
        for entry in entries:
            if entry.layers is not None and len(entry.layers) != len(entries[0].layers or ()):
                raise ConfigError(
                    f"{entry.where}.layer_range: {len(entry.layers)} layers, {entries[0].where} has "
                    f"{len(entries[0].layers or ())}; all sources of a slice need as many"
                )
        base = _ref(value["base_model"], f"{where}.base_model") if value.get("base_model") is not None else None
        found.append(Slice(entries, base, _parameters(value.get("parameters"), f"{where}.parameters"), where))
    return tuple(found)


def _entries(listed: Any, where: str, sliced: bool) -> tuple[ModelEntry, ...]:
    form = "{model: PATH, layer_range: [FIRST, END]}" if sliced else "{model: PATH, parameters: {...}}"
    if not isinstance(listed, list) or not listed:
        what = "missing" if not listed else brief(listed)
        raise ConfigError(f"{where}: {what}; expected a list of {form}")
    entries = tuple(_entry(e, f"{where}[{i}]", sliced, form) for i, e in enumerate(listed))
    seen: dict[Any, int] = {}
    for i, entry in enumerate(entries):
        j = seen.setdefault(identity(entry.ref), i)
        if j != i:
            raise ConfigError(f"{where}[{i}]: {entry.ref} is listed twice, {where}[{j}] is the same; remove one")
    return entries


def _entry(entry: Any, where: str, sliced: bool, form: str) -> ModelEntry:
    if not isinstance(entry, Mapping) or "model" not in entry:
        raise ConfigError(f"{where}: expected {form}, found {brief(entry)}")
    _check_keys(entry, ("model", "layer_range", "parameters")[:: 1 if sliced else 2], f"{where}.")
    layers = _layer_range(entry.get("layer_range"), f"{where}.layer_range") if sliced else None
    parameters = _parameters(entry.get("parameters"), f"{where}.parameters")
    return ModelEntry(_ref(entry["model"], f"{where}.model"), parameters, where, layers)


def _layer_range(value: Any, where: str) -> range:
    whole = isinstance(value, (list, tuple)) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not whole or len(value) != 2 or not 0 <= value[0] <= value[1]:
        raise ConfigError(f"{where}: {brief(value)}; expected [FIRST, END], layers FIRST to END - 1")
    if value[1] > MAX_LAYERS:
        raise ConfigError(f"{where}: {brief(value)}; no model has more than {MAX_LAYERS} layers")
    return range(value[0], value[1])


def _ref(value: Any, where: str) -> ModelRef:
    """A model as text, as ``{path, revision}``, or as mergekit's ``{model, lora, override_architecture}``."""
    if isinstance(value, Mapping):
        name = "path" if "path" in value and "model" not in value else "model"
        _check_keys(value, (name, "revision", "lora", "override_architecture"), f"{where}.")
        if value.get("override_architecture") is not None:
            raise ConfigError(
                f"{where}.override_architecture: has no use here, the tensors come from the checkpoints; leave it out"
            )
        path, revision = value.get(name), value.get("revision")
        if name == "model" and revision is None:
            ref = _ref(path, f"{where}.model")
        else:
            if not isinstance(path, str) or not path or not isinstance(revision, (str, type(None))):
                raise ConfigError(f"{where}: expected {{path: PATH, revision: REVISION}}")
            ref = ModelRef(path, revision)
        if value.get("lora") is None:
            return ref
        lora = _ref(value["lora"], f"{where}.lora")
        if ref.lora is not None or lora.lora is not None:
            raise ConfigError(f"{where}.lora: a second adapter; a model takes one, merge the first into it")
        return ref._replace(lora=lora)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: expected a path or a hub id, found {brief(value)}")
    if local_path(value) is not None:
        return ModelRef(value)
    model, *adapters = value.split("+")
    if len(adapters) > 1:
        raise ConfigError(f"{where}: {value}: expected MODEL or MODEL+ADAPTER; a model takes one adapter")
    refs = [_plain_ref(part, value, where) for part in (model, *adapters)]
    return refs[0]._replace(lora=refs[1]) if adapters else refs[0]


def _plain_ref(text: str, value: str, where: str) -> ModelRef:
    if text and local_path(text) is not None:
        return ModelRef(text)
    path, at, revision = text.partition("@")
    if "@" in revision or (at and not revision) or not path:
        raise ConfigError(f"{where}: {value}: expected PATH or PATH@REVISION, maybe with +ADAPTER")
    return ModelRef(path, revision or None)


def _tokenizer(data: Mapping[str, Any], base: ModelRef) -> TokenizerConfig | None:
    where, value, whole = "tokenizer_source", data.get("tokenizer_source"), data.get("tokenizer")
    if whole is None:
        return None if value is None else TokenizerConfig(_tokenizer_source(value, where, base), {}, 1, where)
    if value is not None:
        raise ConfigError("tokenizer: tokenizer_source is given too; write it as tokenizer.source")
    if not isinstance(whole, Mapping):
        raise ConfigError(f"tokenizer: {brief(whole)}; expected {{source: union, base or PATH, tokens: {{...}}}}")
    _check_keys(whole, ("source", "tokens", "pad_to_multiple_of"), "tokenizer.")
    tokens, unit = whole.get("tokens"), whole.get("pad_to_multiple_of")
    if not isinstance(tokens, (Mapping, type(None))):
        raise ConfigError(f"tokenizer.tokens: {brief(tokens)}; expected a mapping {{TOKEN: {{source: PATH}}}}")
    if unit is not None and (isinstance(unit, bool) or not isinstance(unit, int) or unit < 1):
        raise ConfigError(f"tokenizer.pad_to_multiple_of: {brief(unit)}; expected a whole number of at least 1")
    where = "tokenizer.source"
    source = None if whole.get("source") is None else _tokenizer_source(whole["source"], where, base)
    rules = {_token(t): _token_rule(v, f"tokenizer.tokens.{_name(t)}") for t, v in (tokens or {}).items()}
    return TokenizerConfig(source, rules, unit or 1, where)


def _tokenizer_source(value: Any, where: str, base: ModelRef) -> ModelRef | None:
    if value == "union":
        return None
    return base if value == "base" else _ref(value, where)


def _token(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"tokenizer.tokens: {brief(value)}: expected a token; write it in quotes")
    return value


def _token_rule(value: Any, where: str) -> TokenRule:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {brief(value)}; expected {{source: PATH, force: true or false}}")
    _check_keys(value, ("source", "force"), f"{where}.")
    source, force = value.get("source"), value.get("force")
    if not isinstance(force, (bool, type(None))):
        raise ConfigError(f"{where}.force: {brief(force)}: expected true or false")
    if force and source is None:
        raise ConfigError(f"{where}.source: missing; force says that all models get its row")
    where_source = f"{where}.source"
    if not isinstance(source, Mapping) or "kind" not in source:
        ref = None if source is None else _ref(source, where_source)
        return TokenRule(ref is not None, ref, None, bool(force), where)
    kind = source["kind"]
    if kind == "zero":
        _check_keys(source, ("kind",), f"{where_source}.")
        return TokenRule(True, None, None, bool(force), where)
    if kind != "model_token":
        raise ConfigError(f"{where_source}.kind: {brief(kind)}: expected zero or model_token")
    _check_keys(source, ("kind", "model", "token", "token_id"), f"{where_source}.")
    given = [source[k] for k in ("token", "token_id") if source.get(k) is not None]
    kinds = (("token", str), ("token_id", int))
    fits = any(isinstance(source.get(k), t) and not isinstance(source[k], bool) for k, t in kinds)
    if len(given) > 1 or (given and not fits):
        raise ConfigError(f"{where_source}: expected one of token, a text, and token_id, a whole number")
    token = given[0] if given else None
    return TokenRule(True, _ref(source.get("model"), f"{where_source}.model"), token, bool(force), where)


def _chat_template(value: Any) -> str | None:
    names = (AUTO, *TEMPLATES)
    if value is None or value in names:
        return None if value is None else str(value)
    if not isinstance(value, str):
        raise ConfigError(f"chat_template: {brief(value)}: expected {', '.join(names)} or a Jinja template")
    if len(value) < 20 or "{" not in value:
        raise ConfigError(f"chat_template: {brief(value)}: no such template, and no Jinja{suggest(value, names)}")
    return value


def _dtype(value: Any, where: str) -> DType | None:
    if value is None:
        return None
    names = [d.name for d in dtypes.MERGEABLE]
    name = value.removeprefix("torch.") if isinstance(value, str) else None
    if name not in names:
        raise ConfigError(f"{where}: {brief(value)}: expected one of {', '.join(names)}")
    return dtypes.BY_NAME[name]


def _parameters(value: Any, where: str) -> Mapping[str, Parameter]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping of parameters, found {brief(value)}")
    found = {}
    for key, v in value.items():
        if v is not None:
            name = _name(key)
            found[name] = Parameter(_value(v, f"{where}.{name}"), f"{where}.{name}")
    return found


def _scalar(value: Any, where: str) -> Scalar:
    if isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"{where}: expected a number, true/false or text, found {brief(value)}")


def _value(value: Any, where: str) -> Value:
    if isinstance(value, Mapping):
        return (_condition(value, where),)
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], Mapping):
            return tuple(_condition(v, f"{where}[{i}]") for i, v in enumerate(value))
        return tuple(_scalar(v, f"{where}[{i}]") for i, v in enumerate(value))
    return _scalar(value, where)


def _condition(value: Any, where: str) -> Condition:
    if not isinstance(value, Mapping) or "value" not in value or set(value) - {"filter", "value"}:
        raise ConfigError(f"{where}: expected {{filter: TEXT, value: ...}}, found {brief(value)}")
    text = value.get("filter")
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{where}.filter: expected text, found {brief(text)}")
    inner = value["value"]
    if isinstance(inner, (list, tuple)):
        return Condition(text, tuple(_scalar(v, f"{where}.value[{i}]") for i, v in enumerate(inner)))
    return Condition(text, _scalar(inner, f"{where}.value"))


YES, NO = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")
"""Text that mergekit takes for true and false; YAML itself reads some of it so."""

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def convert(value: Scalar, kind: type, where: str) -> Scalar:
    """A value as the type its parameter has; YAML's ``1e-5`` and ``"0.5"`` are text until here.

    Raises:
        ConfigError: not a value of that type, or not finite.
    """
    if kind is bool:
        if isinstance(value, bool):
            return value
        if value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.lower() in YES + NO:
            return value.lower() in YES
        raise ConfigError(f"{where}: {brief(value)}: expected true or false")
    if kind in (int, float):
        if isinstance(value, str) and _NUMBER.match(value.strip()):
            value = float(value)
        try:
            number = math.nan if isinstance(value, (bool, str)) else float(value)
        except (OverflowError, TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"{where}: {brief(value)}: expected a finite number")
        if kind is float:
            return number
        if number != int(number):
            raise ConfigError(f"{where}: {brief(value)}: expected a whole number")
        return int(value)
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {brief(value)}: expected text")
    return value
