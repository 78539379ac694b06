"""The plan of a merge, made from the recipe, headers and indexes alone.

Everything that can be wrong with the inputs is found here, before the first byte is written. Tensors come from
the checkpoints themselves, in the order of the donor's files; there is no list of architectures.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seme import dtypes
from seme.checkpoint import Checkpoint, Layout, ModelRef, Stored, layout, resolve
from seme.config import MergeConfig, Parameter, suggest
from seme.dtypes import DType
from seme.errors import CheckpointError, ConfigError, TargetError
from seme.methods import Group, Method, Param, get
from seme.ops._op import Spec
from seme.sizes import format_size

HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "output.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "shared.weight",
)
RECOMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias", "position_ids")
"""Buffers that old checkpoints store and transformers computes; left out unless every model has them."""


@dataclass(frozen=True)
class Model:
    """An input model: how the recipe names it, its checkpoint, and the parameters under its entry."""

    ref: ModelRef
    checkpoint: Checkpoint
    parameters: Mapping[str, Parameter]


@dataclass(frozen=True)
class TensorPlan:
    """What is done for one output tensor.

    Attributes:
        group: name, inputs and dtypes, as the method sees them.
        sources: where the tensor lies in each model.
        arguments: the method's parameters for this tensor; empty for a copy.
        copy: not floating point: copied, because all models hold the same bytes.
    """

    group: Group
    sources: tuple[Stored, ...]
    arguments: Mapping[str, Any]
    copy: bool

    @property
    def name(self) -> str:
        """Name of the tensor in the output."""
        return self.group.name

    @property
    def spec(self) -> Spec:
        """Shape and dtype of the output tensor."""
        return Spec(self.group.inputs[0].shape, self.group.out_dtype)


@dataclass(frozen=True)
class Plan:
    """A whole merge, ready to run.

    Attributes:
        config: the recipe.
        method: the merge method.
        models: the inputs, in the recipe's order; an unlisted base model comes last.
        donor: which of them gives config.json and, without ``tokenizer_source``, the tokenizer.
        tokenizer: folder the tokenizer files come from.
        tensors: every output tensor, in the order of the donor's files.
        layout: the output's weight files.
        out_dtype: dtype of most of the output, for config.json.
        bytes_read: bytes of all inputs once; methods with several passes read them again, mostly from the page cache.
        notes: what is worth telling: copies left out, tied heads.
    """

    config: MergeConfig
    method: Method
    models: tuple[Model, ...]
    donor: int
    tokenizer: Path
    tensors: tuple[TensorPlan, ...]
    layout: Layout
    out_dtype: DType
    bytes_read: int
    notes: tuple[str, ...]

    @property
    def bytes_written(self) -> int:
        """Bytes of the output's weight files."""
        return sum(self.layout.sizes)

    def close(self) -> None:
        """Close the inputs."""
        for model in self.models:
            model.checkpoint.close()


def make(config: MergeConfig, target: Path | None = None, max_shard: int = 5 * 10**9, overwrite: bool = False) -> Plan:
    """Check everything and plan the merge.

    Args:
        config: the recipe.
        target: the output folder, to be checked as well; None plans only.
        max_shard: bytes of tensor data per output file.
        overwrite: an existing output folder may be replaced.

    Raises:
        SemeError: the first mistake found in recipe, checkpoints or target.
    """
    method = get(config.merge_method)
    entries = [(m.ref, m.parameters) for m in config.models]
    if config.base_model is not None and config.base_model not in [ref for ref, _ in entries]:
        entries.append((config.base_model, {}))
    _check_recipe(config, method, len(entries))
    paths = [resolve(ref) for ref, _ in entries]
    if target is not None:
        _check_target(target, paths, overwrite)
    models = tuple(Model(ref, Checkpoint(path), given) for (ref, given), path in zip(entries, paths))
    base = [ref for ref, _ in entries].index(config.base_model) if config.base_model is not None else None
    donor = base if base is not None else 0
    if method.base == "input":
        base = None
    notes: list[str] = []
    names = _tensor_names(models, donor, notes)
    layers = _Layers(names)
    tensors = tuple(_tensor(config, method, models, base, name, sources, layers) for name, sources in names.items())
    where = layout([(t.name, t.spec.dtype, t.spec.shape) for t in tensors], max_shard)
    if target is not None:
        _check_space(target, sum(where.sizes))
    tokenizer = resolve(config.tokenizer_source) if config.tokenizer_source else paths[donor]
    if config.tokenizer_source is not None:
        _check_vocabularies(tokenizer, models)
    weight = Counter[DType]()
    for t in tensors:
        if not t.copy:
            weight[t.spec.dtype] += t.spec.numel
    out_dtype = weight.most_common(1)[0][0] if weight else dtypes.float32
    read = sum(s.nbytes for t in tensors for s in t.sources)
    return Plan(config, method, models, donor, tokenizer, tensors, where, out_dtype, read, tuple(notes))


def _check_recipe(config: MergeConfig, method: Method, inputs: int) -> None:
    """Everything that can be said without opening a model."""
    if method.base == "required" and config.base_model is None:
        raise ConfigError(f"base_model: missing; {method.name} works relative to it: add base_model: PATH")
    if inputs < method.min_inputs or (method.max_inputs is not None and inputs > method.max_inputs):
        most = (
            ""
            if method.max_inputs == method.min_inputs
            else " or more"
            if method.max_inputs is None
            else f" to {method.max_inputs}"
        )
        raise ConfigError(
            f"models: {method.name} takes {method.min_inputs}{most} models, base included; found {inputs}"
        )
    known = [p.name for p in method.params]
    for name, parameter in config.parameters.items():
        if name not in known:
            raise ConfigError(f"{parameter.where}: {method.name} has no such parameter{suggest(name, known)}")
    for entry in config.models:
        for name, parameter in entry.parameters.items():
            found = method.param(name)
            if found is None:
                raise ConfigError(f"{parameter.where}: {method.name} has no such parameter{suggest(name, known)}")
            if found.scope == "shared":
                raise ConfigError(f"{parameter.where}: shared by all models; move it to the top-level parameters")


def _check_target(target: Path, sources: list[Path], overwrite: bool) -> None:
    resolved = target.resolve()
    for source in sources:
        folder = (source if source.is_dir() else source.parent).resolve()
        if resolved == folder or folder in resolved.parents or resolved in folder.parents:
            raise TargetError(f"{target}: is, holds or lies in the input model {source}; choose another output folder")
    if target.exists() and not target.is_dir():
        raise TargetError(f"{target}: exists and is not a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise TargetError(f"{target}: not empty; choose another folder or pass --overwrite")


def _check_space(target: Path, needed: int) -> None:
    existing = target.resolve().parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise TargetError(f"{target}: the output needs {format_size(needed)}, {format_size(free)} are free; make room")


def _tied(config: Mapping[str, Any]) -> bool | None:
    """What config.json says about tied embeddings; None if nothing."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == e or name.endswith("." + e) for e in endings)


def _embedding(checkpoint: Checkpoint, head: Stored) -> Stored | None:
    """The input embedding that a head of this shape may be tied to."""
    candidates = [t for t in checkpoint.tensors.values() if _ends(t.name, EMBEDDINGS) and t.shape == head.shape]
    return candidates[0] if candidates else None


def _same_bytes(a: Checkpoint, x: Stored, b: Checkpoint, y: Stored) -> bool:
    """Compare two tensors byte for byte, in pieces."""
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    piece = 1 << 22
    left, right = bytearray(piece), bytearray(piece)
    for start in range(0, x.nbytes, piece):
        n = min(piece, x.nbytes - start)
        a.read_into(x, start, memoryview(left)[:n])
        b.read_into(y, start, memoryview(right)[:n])
        if left[:n] != right[:n]:
            return False
    return True


def _redundant_head(model: Model, head: Stored) -> bool:
    """True if a stored head is only a copy of the tied embedding."""
    embedding = _embedding(model.checkpoint, head)
    if embedding is None or _tied(model.checkpoint.config) is False:
        return False
    if _tied(model.checkpoint.config) or model.checkpoint.shares_storage(head.name, embedding.name):
        return True
    return _same_bytes(model.checkpoint, head, model.checkpoint, embedding)


def _tensor_names(models: tuple[Model, ...], donor: int, notes: list[str]) -> dict[str, tuple[Stored, ...]]:
    """Every output tensor with its place in each model; nothing is left out without a note or an error."""
    stored = [dict(m.checkpoint.tensors) for m in models]
    everywhere = set.intersection(*(set(s) for s in stored))
    for model, tensors in zip(models, stored):
        for name in list(tensors):
            if name not in everywhere and _ends(name, RECOMPUTED):
                del tensors[name]
                notes.append(f"{name} of {model.ref}: left out, transformers computes it")
            elif _ends(name, HEADS) and _tied(models[donor].checkpoint.config) is not False:
                tied_donor = _tied(models[donor].checkpoint.config) or name not in models[donor].checkpoint.tensors
                if tied_donor and _redundant_head(model, tensors[name]):
                    del tensors[name]
                    notes.append(f"{name} of {model.ref}: left out, it is the tied input embedding")
    found: dict[str, tuple[Stored, ...]] = {}
    for name in stored[donor]:
        found[name] = tuple(_find(models, stored, donor, i, name) for i in range(len(models)))
    for tensors in stored:
        extra = [name for name in tensors if name not in stored[donor]]
        if extra:
            where = tensors[extra[0]].file
            raise CheckpointError(
                f"{where}: tensor {extra[0]} is not in {models[donor].ref}{_more(extra)}; "
                "all models need the same tensors, nothing is dropped silently"
            )
    return found


def _more(names: list[str]) -> str:
    return f" (nor are {len(names) - 1} more)" if len(names) > 1 else ""


def _find(models: tuple[Model, ...], stored: list[dict[str, Stored]], donor: int, i: int, name: str) -> Stored:
    wanted = stored[donor][name]
    if name not in stored[i]:
        checkpoint = models[i].checkpoint
        if _ends(name, HEADS) and _tied(checkpoint.config) is not False:
            embedding = _embedding(checkpoint, wanted)
            if embedding is not None:
                return embedding
        missing = [n for n in stored[donor] if n not in stored[i]]
        raise CheckpointError(
            f"{models[i].ref}: tensor {name} is missing{_more(missing)}, {wanted.file} has it; "
            "all models need the same tensors"
        )
    tensor = stored[i][name]
    if tensor.shape != wanted.shape:
        vocabulary = _ends(name, (*HEADS, *EMBEDDINGS))
        remedy = (
            "vocabularies differ: give the models one vocabulary first"
            if vocabulary
            else "only models of one shape merge"
        )
        raise CheckpointError(
            f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, "
            f"{list(wanted.shape)} in {wanted.file}; {remedy}"
        )
    return tensor


class _Layers:
    """Relative depth of a tensor: layer / (layers - 1); 1 in a one-layer stack, 0 outside of the layers."""

    _INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._last: dict[str, int] = {}
        for name in names:
            match = self._INDEX.search(name)
            if match:
                stack = name[: match.start()]
                self._last[stack] = max(self._last.get(stack, 0), int(match[1]))

    def depth(self, name: str) -> float:
        match = self._INDEX.search(name)
        if match is None:
            return 0.0
        last = self._last[name[: match.start()]]
        return int(match[1]) / last if last else 1.0


def _tensor(
    config: MergeConfig,
    method: Method,
    models: tuple[Model, ...],
    base: int | None,
    name: str,
    sources: tuple[Stored, ...],
    layers: _Layers,
) -> TensorPlan:
    inputs = tuple(Spec(s.shape, s.dtype) for s in sources)
    merged = [s for s in sources if s.dtype.mergeable]
    if len(merged) < len(sources):
        return _copy(models, name, sources, inputs, base)
    stored = dtypes.promote([s.dtype for s in sources])
    if config.dtype is not None:
        compute = config.dtype
    else:
        compute = stored if config.compat == "mergekit" else dtypes.arithmetic(stored)
    out_dtype = config.out_dtype or config.dtype or stored
    group = Group(name, inputs, base, compute, out_dtype)
    arguments: dict[str, Any] = {}
    for param in method.params:
        key = f"{param.name}_" if param.name in ("lambda",) else param.name
        if param.scope == "shared":
            arguments[key] = _lookup(param, [config.parameters], name, layers, f"parameters.{param.name}")
        else:
            chosen = range(len(models)) if param.scope == "model" else group.experts
            arguments[key] = [
                _lookup(
                    param, [models[i].parameters, config.parameters], name, layers, f"{models[i].ref}: {param.name}"
                )
                for i in chosen
            ]
    return TensorPlan(group, sources, arguments, copy=False)


def _lookup(param: Param, scopes: list[Mapping[str, Parameter]], name: str, layers: _Layers, where: str) -> Any:
    for scope in scopes:
        if param.name in scope:
            value = scope[param.name].at(name, layers.depth(name), param.kind)
            if value is not None:
                return value
    if param.required:
        raise ConfigError(f"{where}: missing for tensor {name}; {param.name}: {param.doc}")
    return param.default


def _copy(
    models: tuple[Model, ...], name: str, sources: tuple[Stored, ...], inputs: tuple[Spec, ...], base: int | None
) -> TensorPlan:
    for model, source in zip(models[1:], sources[1:]):
        if not _same_bytes(models[0].checkpoint, sources[0], model.checkpoint, source):
            raise CheckpointError(
                f"{source.file}: tensor {name} ({source.dtype}) differs from {sources[0].file} ({sources[0].dtype}); "
                "tensors that are not floating point must be equal in all models"
            )
    return TensorPlan(Group(name, inputs, base, sources[0].dtype, sources[0].dtype), sources, {}, copy=True)


def _check_vocabularies(tokenizer: Path, models: tuple[Model, ...]) -> None:
    """With ``tokenizer_source`` every model must give each token the id that the output's tokenizer gives it."""
    from seme.checkpoint.tokenizer import first_difference

    for model in models:
        difference = first_difference(tokenizer, model.checkpoint.path)
        if difference is not None:
            raise CheckpointError(
                f"{model.ref}: its vocabulary differs from {tokenizer}: {difference}; "
                "merge models of one vocabulary, or leave tokenizer_source out to merge the rows as they are"
            )
