"""The plan of a merge, made from the recipe, headers and indexes alone.

Everything that can be wrong with the inputs is found here, before the first byte is written, but for inf and NaN
among their values. Tensors come from the checkpoints themselves, in the order of the donor's files; there is no list of
architectures.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seme import dtypes
from seme.checkpoint import Checkpoint, Layout, ModelRef, check_free, layout, locate, resolve, same_model
from seme.config import MergeConfig, Parameter, suggest
from seme.dtypes import DType
from seme.errors import CheckpointError, ConfigError, TargetError, brief
from seme.methods import Group, Method, Param, get
from seme.ops._op import Spec
from seme.roles import TensorRole, latent, layer, layers, roles
from seme.sizes import format_size
from seme.sources import Source, StoredTensor

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

SAME_TENSORS = (
    "all models need the same tensors: take models of one architecture, or load this one in transformers and save it"
)

CONFIG_KEYS = (
    "model_type",
    "architectures",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "num_experts_per_tok",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
)
"""Entries of config.json that change what tensors of the same shapes compute."""


@dataclass(frozen=True)
class Model:
    """An input model: how the recipe names it, its checkpoint, its tensors as they are merged, and the parameters under
    its entry."""

    ref: ModelRef
    checkpoint: Checkpoint
    tensors: Mapping[str, Source]
    parameters: Mapping[str, Parameter]


@dataclass(frozen=True)
class TensorPlan:
    """What is done for one output tensor.

    Attributes:
        group: name, inputs and dtypes, as the method sees them.
        sources: where the elements of each input come from.
        arguments: the method's parameters for this tensor; empty for a copy.
        copy: not floating point: copied, because all models hold the same bytes.
        unit: elements that a pass of the method must have in memory together.
        role: what the tensor is to the residual stream; None where the method does not ask.
        rule: what a matrix method does with it; empty for other methods.
    """

    group: Group
    sources: tuple[Source, ...]
    arguments: Mapping[str, Any]
    copy: bool
    unit: int = 1
    role: TensorRole | None = None
    rule: str = ""

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
    def inputs(self) -> int:
        """The most inputs that a tensor has."""
        return max((len(t.sources) for t in self.tensors), default=0)

    @property
    def bytes_written(self) -> int:
        """Bytes of the output's weight files."""
        return sum(self.layout.sizes)

    def close(self) -> None:
        """Close the inputs."""
        for model in self.models:
            model.checkpoint.close()


def make(
    config: MergeConfig,
    target: Path | None = None,
    max_shard: int = 5 * 10**9,
    overwrite: bool = False,
    recipe: Path | None = None,
) -> Plan:
    """Check everything and plan the merge.

    Args:
        config: the recipe.
        target: the output folder, to be checked as well; None plans only.
        max_shard: bytes of tensor data per output file.
        overwrite: an existing output folder may be replaced, if it is a model.
        recipe: the file of the recipe, which the output folder must not hold.

    Raises:
        SemeError: the first mistake found in recipe, checkpoints or target.
    """
    method = get(config.merge_method)
    entries = [(m.ref, m.parameters) for m in config.models]
    base = None
    if config.base_model is not None:
        base = next((i for i, (ref, _) in enumerate(entries) if same_model(ref, config.base_model)), len(entries))
        if base == len(entries):
            entries.append((config.base_model, {}))
    refs = [ref for ref, _ in entries]
    _check_recipe(config, method, entries, base)
    tokenizer_of = base or 0 if config.tokenizer_source is None else _position(config.tokenizer_source, refs)
    local = [path for ref in refs if (path := locate(ref)) is not None]
    if target is not None:
        _check_target(target, local, overwrite, recipe)
    paths = [resolve(ref) for ref in refs]  # from here on there may be downloads
    if target is not None:
        _check_target(target, paths, overwrite, recipe)
    models: list[Model] = []
    try:
        for (ref, given), path in zip(entries, paths):
            checkpoint = Checkpoint(path)
            models.append(Model(ref, checkpoint, stored_tensors(checkpoint), given))
        return _plan(config, method, tuple(models), base, _folder(paths[tokenizer_of]), target, max_shard)
    except BaseException:
        for model in models:
            model.checkpoint.close()
        raise


def _plan(
    config: MergeConfig,
    method: Method,
    models: tuple[Model, ...],
    base: int | None,
    tokenizer: Path,
    target: Path | None,
    max_shard: int,
) -> Plan:
    donor = base or 0
    if method.base == "input":
        base = None
    notes = _config_notes(models, donor)
    names = _tensor_names(models, donor, notes)
    depths = _Layers(names)
    shapes = {name: sources[donor].shape for name, sources in names.items()}
    found = roles(models[donor].checkpoint.config, shapes, config.roles) if method.matrix else {}
    tensors = tuple(
        _tensor(config, method, models, base, name, sources, depths, found.get(name)) for name, sources in names.items()
    )
    if method.uses_bases is not None and any(method.uses_bases(t.arguments) for t in tensors if not t.copy):
        latent(models[donor].checkpoint.config, shapes, config.roles)
    method.asks_for_whole({t.name: t.arguments for t in tensors if not t.copy})
    where = layout([(t.name, t.spec.dtype, t.spec.shape) for t in tensors], max_shard)
    if target is not None:
        _check_place(target, sum(where.sizes))
    if config.tokenizer_source is not None:
        _check_tokenizer(tokenizer, models)
    weight = Counter[DType]()
    for t in tensors:
        if not t.copy:
            weight[t.spec.dtype] += t.spec.numel
    out_dtype = weight.most_common(1)[0][0] if weight else dtypes.float32
    read = sum(s.nbytes for t in tensors for s in t.sources)
    return Plan(config, method, models, donor, tokenizer, tensors, where, out_dtype, read, tuple(notes))


def stored_tensors(checkpoint: Checkpoint) -> dict[str, Source]:
    """Every tensor of a checkpoint, as it lies there."""
    return {name: StoredTensor(checkpoint, stored) for name, stored in checkpoint.tensors.items()}


def _folder(path: Path) -> Path:
    """The folder of a model that is given as a folder or as its weight file."""
    return path if path.is_dir() else path.parent


def _check_recipe(
    config: MergeConfig, method: Method, entries: list[tuple[ModelRef, Mapping[str, Parameter]]], base: int | None
) -> None:
    """Everything that can be said without opening a model."""
    if method.base == "required" and config.base_model is None:
        raise ConfigError(f"base_model: missing; {method.name} works relative to it: add base_model: PATH")
    method.check_inputs(len(entries))
    known = [p.name for p in method.params]
    for given in (config.parameters, *(entry.parameters for entry in config.models)):
        for name, parameter in given.items():
            found = method.param(name)
            if found is None:
                raise ConfigError(f"{parameter.where}: {method.name} has no such parameter{suggest(name, known)}")
            if found.scope == "shared" and given is not config.parameters:
                raise ConfigError(f"{parameter.where}: shared by all models; move it to the top-level parameters")
            for value in parameter.scalars():
                found.convert(value, parameter.where)
    for param in method.params:
        if not param.required or param.name in config.parameters:
            continue
        if param.scope == "shared":
            raise ConfigError(f"parameters.{param.name}: missing; {param.doc}")
        for i, (ref, parameters) in enumerate(entries):
            if param.name not in parameters and (param.scope == "model" or method.base == "input" or i != base):
                raise ConfigError(f"{ref}: {param.name}: missing; {param.doc}")


def _position(source: ModelRef, refs: list[ModelRef]) -> int:
    """Which of the models ``tokenizer_source`` names."""
    found = next((i for i, ref in enumerate(refs) if same_model(ref, source)), None)
    if found is None:
        raise ConfigError(
            f"tokenizer_source: {source} is none of the models; expected base or one of {', '.join(map(str, refs))}"
        )
    return found


def _check_target(target: Path, sources: list[Path], overwrite: bool, recipe: Path | None) -> None:
    resolved = target.resolve()
    if recipe is not None and resolved in recipe.resolve().parents:
        raise TargetError(f"{target}: holds the recipe {recipe}; choose another output folder")
    for source in sources:
        for place in (source.resolve(), source.parent.resolve() / source.name):  # a link's end, and the link itself
            if resolved in (place, *place.parents) or (source.is_dir() and place in resolved.parents):
                raise TargetError(f"{target}: is, holds or lies in the input model {source}; choose another folder")
    check_free(target, overwrite)


def _check_place(target: Path, needed: int) -> None:
    """Refuse a place where the output cannot be made."""
    existing = target.resolve().parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise TargetError(f"{target}: {existing} is not a folder; choose another output folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise TargetError(f"{target}: {existing} cannot be written to; choose another output folder")
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise TargetError(f"{target}: the output needs {format_size(needed)}, {format_size(free)} are free; make room")


def _config_notes(models: tuple[Model, ...], donor: int) -> list[str]:
    """Where the models' config.json say different things of tensors that are then merged all the same."""
    ours, notes = _settings(models[donor].checkpoint.config), []
    for model in models:
        for key, value in _settings(model.checkpoint.config).items():
            if key in ours and value != ours[key]:
                notes.append(
                    f"config.json of {model.ref}: {key} is {brief(value)}; "
                    f"the output takes {brief(ours[key])} from {models[donor].ref}"
                )
    return notes


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries of a config.json named in :data:`CONFIG_KEYS`, those of the nested configs of multimodal models too."""
    found = {}
    for key, value in config.items():
        if key == "rope_parameters" and isinstance(value, Mapping) and "rope_theta" in value:
            found[f"{prefix}rope_theta"] = value["rope_theta"]  # where older files have it
            value = {k: v for k, v in value.items() if k != "rope_theta"}
        if key in CONFIG_KEYS:
            found[prefix + key] = value
        elif key.endswith("_config") and isinstance(value, Mapping):
            found.update(_settings(value, f"{prefix}{key}."))
    return found


def _tied(config: Mapping[str, Any]) -> bool | None:
    """What config.json says about tied embeddings; None if nothing."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == e or name.endswith("." + e) for e in endings)


def _embedding(model: Model, head: Source) -> Source | None:
    """The input embedding that a head of this shape may be tied to."""
    candidates = [t for t in model.tensors.values() if _ends(t.name, EMBEDDINGS) and t.shape == head.shape]
    return candidates[0] if candidates else None


def _one_memory(x: Source, y: Source) -> bool:
    """True if two tensors of a ``.bin`` checkpoint are one memory (tied weights)."""
    return (
        isinstance(x, StoredTensor)
        and isinstance(y, StoredTensor)
        and x.checkpoint is y.checkpoint
        and x.checkpoint.shares_storage(x.name, y.name)
    )


def _same_bytes(x: Source, y: Source) -> bool:
    """Compare two tensors byte for byte, in pieces."""
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    piece = 1 << 22
    left, right = bytearray(piece), bytearray(piece)
    for start in range(0, x.nbytes, piece):
        n = min(piece, x.nbytes - start)
        x.read_into(start, memoryview(left)[:n])
        y.read_into(start, memoryview(right)[:n])
        if left[:n] != right[:n]:
            return False
    return True


def _is_copy(model: Model, head: Source) -> bool:
    """True if a stored head is only a copy of the input embedding."""
    embedding = _embedding(model, head)
    return embedding is not None and (_one_memory(head, embedding) or _same_bytes(head, embedding))


def _ties(model: Model, head: str) -> bool:
    """True if a model's head is its input embedding: as config.json says, else as it is stored."""
    said = _tied(model.checkpoint.config)
    if said is not None or head not in model.tensors:
        return said is not False
    embedding = _embedding(model, model.tensors[head])
    return embedding is not None and _one_memory(model.tensors[head], embedding)


def _tensor_names(models: tuple[Model, ...], donor: int, notes: list[str]) -> dict[str, tuple[Source, ...]]:
    """Every output tensor with its place in each model; nothing is left out without a note or an error."""
    stored = [dict(m.tensors) for m in models]
    everywhere = set.intersection(*(set(s) for s in stored))
    for model, tensors in zip(models, stored):
        for name in list(tensors):
            if name not in everywhere and _ends(name, RECOMPUTED):
                del tensors[name]
                notes.append(f"{name} of {model.ref}: left out, transformers computes it")
            elif _ends(name, HEADS) and _ties(models[donor], name) and _is_copy(model, tensors[name]):
                del tensors[name]
                notes.append(f"{name} of {model.ref}: left out, it is the tied input embedding")
            elif name not in everywhere and (twin := _twin(model, tensors[name], everywhere)):
                del tensors[name]
                notes.append(f"{name} of {model.ref}: left out, it is {twin} again")
    found: dict[str, tuple[Source, ...]] = {}
    for name in stored[donor]:
        found[name] = tuple(_find(models, stored, donor, i, name) for i in range(len(models)))
    for tensors in stored:
        extra = [name for name in tensors if name not in stored[donor]]
        if extra:
            where = tensors[extra[0]].file
            raise CheckpointError(
                f"{where}: tensor {extra[0]}{_more(extra)} is not in {models[donor].ref}; {SAME_TENSORS}"
            )
    return found


def _twin(model: Model, tensor: Source, names: Iterable[str]) -> str | None:
    """Which of ``names`` a tensor of a ``.bin`` file is one memory with: it stores tied tensors under every name. What
    a head is tied to is decided elsewhere."""
    if _ends(tensor.name, HEADS):
        return None
    for name in names:
        if _one_memory(tensor, model.tensors[name]) and _same_bytes(tensor, model.tensors[name]):
            return name
    return None


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _find(models: tuple[Model, ...], stored: list[dict[str, Source]], donor: int, i: int, name: str) -> Source:
    wanted = stored[donor][name]
    if name not in stored[i]:
        if _ends(name, HEADS) and _ties(models[i], name):
            embedding = _embedding(models[i], wanted)
            if embedding is not None:
                return embedding
        missing = [n for n in stored[donor] if n not in stored[i]]
        raise CheckpointError(
            f"{models[i].ref}: tensor {name}{_more(missing)} is missing, {wanted.file} has it; {SAME_TENSORS}"
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

    def __init__(self, names: Iterable[str]) -> None:
        self._count = layers(names)

    def depth(self, name: str) -> float:
        found = layer(name)
        if found is None:
            return 0.0
        last = self._count[found[0]] - 1
        return found[1] / last if last else 1.0


def _tensor(
    config: MergeConfig,
    method: Method,
    models: tuple[Model, ...],
    base: int | None,
    name: str,
    sources: tuple[Source, ...],
    layers: _Layers,
    role: TensorRole | None,
) -> TensorPlan:
    inputs = tuple(Spec(s.shape, s.dtype) for s in sources)
    merged = [s for s in sources if s.dtype.mergeable]
    if len(merged) < len(sources):
        return _copy(name, sources, inputs, base)
    stored = dtypes.promote([s.dtype for s in sources])
    if config.dtype is not None:
        compute = config.dtype
    else:
        compute = stored if config.compat == "mergekit" else dtypes.arithmetic(stored)
    out_dtype = config.out_dtype or config.dtype or stored
    group = Group(name, inputs, base, compute, out_dtype, config.seed, config.compat == "mergekit")
    arguments: dict[str, Any] = {}
    for param in method.params:
        if param.scope == "shared":
            arguments[param.key] = _lookup(param, [config.parameters], name, layers, f"parameters.{param.name}")
        else:
            chosen = range(len(models)) if param.scope == "model" else group.experts
            arguments[param.key] = [
                _lookup(
                    param, [models[i].parameters, config.parameters], name, layers, f"{models[i].ref}: {param.name}"
                )
                for i in chosen
            ]
    method.check_arguments(group, arguments)
    rule = method.describe(role, inputs[0].shape, arguments) if role is not None and method.describe is not None else ""
    unit = method.unit(inputs[0].shape, arguments) if method.unit is not None else 1
    return TensorPlan(group, sources, arguments, copy=False, unit=unit, role=role, rule=rule)


def _lookup(param: Param, scopes: list[Mapping[str, Parameter]], name: str, layers: _Layers, where: str) -> Any:
    for scope in scopes:
        if param.name in scope:
            value = scope[param.name].at(name, layers.depth(name), param.kind)
            if value is not None:
                return value
    if param.required:
        raise ConfigError(f"{where}: missing for tensor {name}; {param.name}: {param.doc}")
    return param.default


def _copy(name: str, sources: tuple[Source, ...], inputs: tuple[Spec, ...], base: int | None) -> TensorPlan:
    for source in sources[1:]:
        if not _same_bytes(sources[0], source):
            raise CheckpointError(
                f"{source.file}: tensor {name} ({source.dtype}) differs from {sources[0].file} ({sources[0].dtype}); "
                f"{dtypes.why_equal(s.dtype for s in sources)}"
            )
    return TensorPlan(Group(name, inputs, base, sources[0].dtype, sources[0].dtype), sources, {}, copy=True)


def _check_tokenizer(tokenizer: Path, models: tuple[Model, ...]) -> None:
    """With ``tokenizer_source`` there must be one, and every model must give each token the id that it gives it."""
    from seme.checkpoint.tokenizer import VOCABULARY_FILES, first_difference

    if not any((tokenizer / file).exists() for file in VOCABULARY_FILES):
        raise CheckpointError(
            f"{tokenizer}: no tokenizer in it, such as {VOCABULARY_FILES[0]}; "
            "name a model that has one in tokenizer_source, or leave it out"
        )
    for model in models:
        difference = first_difference(tokenizer, model.checkpoint.path)
        if difference is not None:
            raise CheckpointError(
                f"{model.ref}: its vocabulary differs from {tokenizer}: {difference}; "
                "merge models of one vocabulary, or leave tokenizer_source out to merge the rows as they are"
            )
