"""The plan of a merge, made from the recipe, headers and indexes alone.

Everything that can be wrong with the inputs is found here, before the first byte is written, but for inf and NaN
among their values. Tensors come from the checkpoints themselves, in the order of the donor's files; there is no list of
architectures.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seme import dtypes
from seme.checkpoint import (
    Checkpoint,
    Layout,
    ModelRef,
    chat,
    check_free,
    identity,
    layout,
    locate,
    reserved,
    resolve,
    same_model,
)
from seme.checkpoint.adapter import apply as adapted
from seme.checkpoint.tokenizer import VOCABULARY_FILES
from seme.config import MergeConfig, ModelEntry, Parameter, Section, Slice, suggest
from seme.dtypes import DType
from seme.errors import CheckpointError, ConfigError, TargetError, brief
from seme.methods import Group, Method, Param, get
from seme.ops._op import Spec
from seme.roles import TensorRole, latent, layer, layers, roles
from seme.sections import TEXT_CONFIGS, LayerIndex, choose, is_all, modules, with_layers
from seme.sizes import format_size
from seme.sources import Gathered, Source, StoredTensor
from seme.vocabulary import Alignment, align, rows_of, vocabulary_tensors

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
    """An input model: how the recipe names it, its checkpoint, its tensors as they are merged, its LoRA adapter."""

    ref: ModelRef
    checkpoint: Checkpoint
    tensors: Mapping[str, Source]
    adapter: Checkpoint | None = None

    @functools.cached_property
    def embeddings(self) -> tuple[Source, ...]:
        """Those of its tensors whose names say that they are an input embedding."""
        return tuple(t for t in self.tensors.values() if _ends(t.name, EMBEDDINGS))

    def close(self) -> None:
        """Close the files."""
        self.checkpoint.close()
        if self.adapter is not None:
            self.adapter.close()


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
        model_config: contents of config.json as the output has it, but for the dtype.
        tokenizer: folder the tokenizer files come from.
        tokenizer_files: contents of those that are not as they are there, by name.
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
    model_config: Mapping[str, Any]
    tokenizer: Path
    tokenizer_files: Mapping[str, str]
    tensors: tuple[TensorPlan, ...]
    layout: Layout
    out_dtype: DType
    bytes_read: int
    notes: tuple[str, ...]

    @functools.cached_property
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
            model.close()


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
    method, sections, refs = _checked(config)
    donor = _position(config.base_model, refs) if config.base_model is not None else 0
    loras = [ref.lora for ref in refs if ref.lora is not None]
    apart = _tokenizer_apart(config, refs)
    others = loras if apart is None else [*loras, apart]
    local = [path for ref in (*refs, *others) if (path := locate(ref)) is not None]
    if target is not None:
        _check_target(target, local, overwrite, recipe)
    tokenizer = None if apart is None else resolve(apart, weights=False)  # from here on there may be downloads
    paths = [resolve(ref) for ref in refs]
    adapters = {ref: resolve(ref.lora) for ref in refs if ref.lora is not None}
    if target is not None:
        also = [] if tokenizer is None else [tokenizer]
        _check_target(target, [*paths, *adapters.values(), *also], overwrite, recipe)
    models: list[Model] = []
    try:
        for ref, path in zip(refs, paths):
            checkpoint = Checkpoint(path)
            models.append(Model(ref, checkpoint, stored_tensors(checkpoint)))
            if (lora := adapters.get(ref)) is not None:
                tensors, adapter = adapted(lora, models[-1].tensors)
                models[-1] = replace(models[-1], tensors=tensors, adapter=adapter)
        folders = [path if path.is_dir() else path.parent for path in paths]  # of a model that is given as a file
        return _plan(config, method, sections, tuple(models), folders, donor, tokenizer, target, max_shard)
    except BaseException:
        for model in models:
            model.close()
        raise


def check(config: MergeConfig, made: Collection[str] = ()) -> None:
    """Check what can be checked of a recipe without opening its models; those named in ``made`` are yet to come.

    Raises:
        SemeError: the first mistake found.
    """
    _, _, refs = _checked(config)
    for ref in (*refs, *(ref.lora for ref in refs), _tokenizer_apart(config, refs)):
        if ref is not None and ref.path not in made:
            locate(ref)


def _checked(config: MergeConfig) -> tuple[Method, tuple[Section, ...], list[ModelRef]]:
    """The method, the sections with their base models, every model; checked as far as the recipe goes."""
    method = get(config.merge_method)
    sections = _with_base(config)
    refs = _refs(config, sections)
    _check_recipe(config, method, sections)
    _check_tokens(config, refs)
    return method, sections, refs


def _with_base(config: MergeConfig) -> tuple[Section, ...]:
    """The recipe's sections; a base model that is not among the ``models`` of one is its last entry."""
    base = config.base_model
    found = []
    for section in config.sections:
        entries = section.slices[0].entries
        if not section.sliced and base is not None and not any(same_model(e.ref, base) for e in entries):
            added = ModelEntry(base, {}, "base_model")
            section = replace(section, slices=(replace(section.slices[0], entries=(*entries, added)),))
        found.append(section)
    return tuple(found)


def _refs(config: MergeConfig, sections: tuple[Section, ...]) -> list[ModelRef]:
    """Every model of the recipe once, in its order."""
    found: list[ModelRef] = []
    listed = [e.ref for section in sections for s in section.slices for e in s.entries]
    seen: set[Any] = set()
    for ref in dict.fromkeys((*listed, *([config.base_model] if config.base_model is not None else []))):
        if (key := identity(ref)) not in seen:
            seen.add(key)
            found.append(ref)
    return found


def _position(ref: ModelRef, refs: list[ModelRef]) -> int:
    if ref in refs:  # spelt so, which asks the file system nothing
        return refs.index(ref)
    return next(i for i, other in enumerate(refs) if same_model(other, ref))


def _plan(
    config: MergeConfig,
    method: Method,
    sections: tuple[Section, ...],
    models: tuple[Model, ...],
    folders: list[Path],
    donor: int,
    apart: Path | None,
    target: Path | None,
    max_shard: int,
) -> Plan:
    notes = _config_notes(models, donor)
    alignment = None
    if config.tokenizer is not None:
        counts = [_vocabulary_size(model) for model in models]
        alignment = align(config.tokenizer, [m.ref for m in models], folders, counts, donor, apart)
        notes += alignment.notes
    targets, model_config = _targets(config, method, sections, models, donor, alignment, notes)
    shapes = {t.name: t.sources[t.lead].shape for t in targets}
    found = roles(model_config, shapes, config.roles) if method.matrix else {}
    tensors = tuple(_tensor(config, method, t, found.get(t.name)) for t in targets)
    if method.uses_bases is not None and any(method.uses_bases(t.arguments) for t in tensors if not t.copy):
        if models[donor].adapter is not None:
            raise ConfigError(
                f"base_model: {models[donor].ref}: semantic bases are those of a stored head; use sigma: 0"
            )
        latent(models[donor].checkpoint.config, shapes, config.roles)
    whole = method.asks_for_whole({t.name: t.arguments for t in tensors if not t.copy})
    changed = any(isinstance(s, Gathered) for t in targets for s in t.sources)
    if whole and (changed or any(section.sliced or section.module for section in sections)):
        raise ConfigError(
            "parameters.rule: sequence runs the models as they are, without slices, modules and other vocabularies; "
            "use rule: project"
        )
    where = layout([(t.name, t.spec.dtype, t.spec.shape) for t in tensors], max_shard)
    if target is not None:
        _check_place(target, sum(where.sizes))
    weight = Counter[DType]()
    for t in tensors:
        if not t.copy:
            weight[t.spec.dtype] += t.spec.numel
    out_dtype = weight.most_common(1)[0][0] if weight else dtypes.float32
    read = sum(s.nbytes for t in tensors for s in t.sources)
    notes = list(dict.fromkeys(notes))
    tokenizer, files = (folders[donor], {}) if alignment is None else (alignment.folder, alignment.files)
    if config.chat_template is not None:
        files = _with_template(config.chat_template, folders, tokenizer, files, notes)
        notes = list(dict.fromkeys(notes))
    return Plan(
        config, method, models, donor, model_config, tokenizer, files, tensors, where, out_dtype, read, tuple(notes)
    )


def _with_template(
    wanted: str, folders: list[Path], tokenizer: Path, files: Mapping[str, str], notes: list[str]
) -> Mapping[str, str]:
    """The tokenizer's files with the chat template that the recipe asks for."""
    if not any((tokenizer / name).exists() for name in VOCABULARY_FILES):
        raise CheckpointError(f"{tokenizer}: no tokenizer in it that a chat_template could be of; leave that out")
    template = chat.choose(wanted, folders)
    if template is None:
        notes.append("chat_template: none of the models has one")
        return files
    return chat.with_template(tokenizer, files, template)


def _vocabulary_size(model: Model) -> int:
    """Tokens that a model has rows for; without an embedding, as many as config.json says."""
    shapes = {name: t.shape for name, t in model.tensors.items()}
    found = sorted(vocabulary_tensors(model.checkpoint.config, shapes), key=lambda n: not _ends(n, EMBEDDINGS))
    if found:
        return rows_of(shapes[found[0]])
    raise CheckpointError(f"{model.ref}: no embedding of a vocabulary in it; leave tokenizer and tokenizer_source out")


@dataclass(frozen=True)
class _View:
    """What a slice takes of a model, by the names in the output; ``own`` has the model's names where they differ."""

    model: Model
    tensors: Mapping[str, Source]
    own: Mapping[str, str]


@dataclass(frozen=True)
class _Target:
    """An output tensor, before its parameters are looked up.

    Attributes:
        name: in the output.
        sources: its inputs.
        own: what the inputs call it.
        entries: of the recipe, one per input.
        base: which input is the base of the method.
        lead: which input says what shape it has, in doubt.
        stored: dtypes of the inputs in their checkpoints.
        scopes: where parameters of all inputs may stand, the nearest first.
        depth: in [0, 1], for gradients.
    """

    name: str
    sources: tuple[Source, ...]
    own: tuple[str, ...]
    entries: tuple[ModelEntry, ...]
    base: int | None
    lead: int
    stored: tuple[DType, ...]
    scopes: tuple[Mapping[str, Parameter], ...]
    depth: float


def _targets(
    config: MergeConfig,
    method: Method,
    sections: tuple[Section, ...],
    models: tuple[Model, ...],
    donor: int,
    alignment: Alignment | None,
    notes: list[str],
) -> tuple[list[_Target], dict[str, Any]]:
    """Every output tensor, and config.json with the output's layers."""
    refs = [m.ref for m in models]
    whole = is_all(s.module for s in sections)
    kinds = [{} if whole else modules(m.tensors) for m in models]
    chosen = [""] if whole else choose([(s.module or "", s.where) for s in sections], kinds[donor])
    model_config = dict(models[donor].checkpoint.config)
    found: list[_Target] = []
    for section, module in zip(sections, chosen):
        parts: dict[int, LayerIndex] = {}  # of the models, once for all slices
        start = 0
        origin: list[tuple[Mapping[str, Any], int]] = []
        for number, part in enumerate(section.slices):
            entries, base = part.entries, _base(config, method, part)
            used = [_position(e.ref, refs) for e in entries]
            ends = number == 0, number == len(section.slices) - 1
            views = []
            for i, entry in zip(used, entries):
                if i not in parts:
                    parts[i] = LayerIndex(n for n in models[i].tensors if kinds[i].get(n, "") == module)
                views.append(_view(models[i], parts[i], entry, section.where, start, ends))
            lead = _lead(config, part)
            vocabulary: set[str] = set()
            if alignment is not None:
                shapes = {n: t.shape for n, t in views[lead].tensors.items()}
                vocabulary = vocabulary_tensors(model_config, shapes)
            matched = _tensor_names(views, lead, vocabulary, notes)
            depths = _Layers(matched)
            scopes = (part.parameters, section.parameters, config.parameters)
            for name, sources in matched.items():
                depth = depths.depth(name)
                if (span := entries[0].layers) is not None and (place := layer(name)) is not None:
                    depth = (place[1] - start) / (len(span) - 1) if len(span) > 1 else 1.0
                own = tuple(v.own.get(name, name) for v in views)
                stored = tuple(s.dtype for s in sources)
                if alignment is not None and name in vocabulary:
                    center = lead if part.base_model or config.base_model else None
                    sources = _aligned(config, alignment, tuple(used), center, sources)
                found.append(_Target(name, sources, own, entries, base, lead, stored, scopes, depth))
            span = entries[lead].layers
            if span is not None:
                origin += [(models[used[lead]].checkpoint.config, i) for i in span]
                start += len(span)
        if section.sliced and origin and model_config:
            model_config = with_layers(model_config, module, origin)
    if alignment is not None:
        model_config = _with_vocabulary(model_config, alignment.rows)
    return found, model_config


def _aligned(
    config: MergeConfig, alignment: Alignment, models: tuple[int, ...], base: int | None, sources: tuple[Source, ...]
) -> tuple[Source, ...]:
    """Inputs whose rows are tokens, with the rows of the output's vocabulary."""
    rows = alignment.sources(models, base, tuple(rows_of(s.shape) for s in sources))
    dtype = dtypes.promote([s.dtype for s in sources])
    if any(r is not None and r.averages for r in rows) and config.compat != "mergekit":
        dtype = dtypes.arithmetic(dtype)  # means are not rounded before they are merged
    if config.dtype is not None and any(r is not None and r.averages for r in rows):
        dtype = config.dtype
    return tuple(s if r is None else Gathered(s, sources, r, dtype) for s, r in zip(sources, rows))


def _with_vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """config.json with the number of tokens, where it has it."""
    nested = {
        key: _with_vocabulary(value, rows)
        for key, value in config.items()
        if key in TEXT_CONFIGS and isinstance(value, Mapping) and "vocab_size" in value
    }
    return {**config, **nested, **({"vocab_size": rows} if "vocab_size" in config or not nested else {})}


def _base(config: MergeConfig, method: Method, part: Slice) -> int | None:
    """Which entry of a slice is the base of the method; None if it takes none.

    Raises:
        ConfigError: it is none of them.
    """
    ref = part.base_model or config.base_model
    if method.base == "input" or ref is None:
        return None
    for i, entry in enumerate(part.entries):
        if same_model(entry.ref, ref):
            return i
    raise ConfigError(
        f"{part.where}.sources: the base model {ref} is not among them; add it, or name another base_model in the slice"
    )


def _lead(config: MergeConfig, part: Slice) -> int:
    """Which entry of a slice gives names and order of its tensors: the base model, else the first."""
    ref = part.base_model or config.base_model
    return next((i for i, e in enumerate(part.entries) if ref is not None and same_model(e.ref, ref)), 0)


def _view(model: Model, part: LayerIndex, entry: ModelEntry, where: str, start: int, ends: tuple[bool, bool]) -> _View:
    """What a slice, whose first layer has the number ``start`` in the output, takes of these tensors of a model;
    ``ends``: whether it is the first slice, the last one."""
    if entry.layers is None:
        return _View(model, {n: model.tensors[n] for n in part.names}, {})
    count = part.count(where)
    if entry.layers.stop > count:
        raise ConfigError(
            f"{entry.where}.layer_range: [{entry.layers.start}, {entry.layers.stop}]; {model.ref} has {count} layers"
        )
    own = part.moved(entry.layers, start, *ends)
    return _View(model, {n: model.tensors[o] for n, o in own.items()}, own)


def stored_tensors(checkpoint: Checkpoint) -> dict[str, Source]:
    """Every tensor of a checkpoint, as it lies there."""
    return {name: StoredTensor(checkpoint, stored) for name, stored in checkpoint.tensors.items()}


def _check_recipe(config: MergeConfig, method: Method, sections: tuple[Section, ...]) -> None:
    """Everything that can be said without opening a model."""
    known = [p.name for p in method.params]
    shared = [config.parameters]
    for section in sections:
        shared += [section.parameters, *(s.parameters for s in section.slices)]
        for part in section.slices:
            if method.base == "required" and (part.base_model or config.base_model) is None:
                raise ConfigError(f"base_model: missing; {method.name} works relative to it: add base_model: PATH")
            base = _base(config, method, part)
            where = f"{part.where}.sources" if section.sliced else part.where
            method.check_inputs(len(part.entries), base is not None, where)
    own = [entry.parameters for section in sections for s in section.slices for entry in s.entries]
    for number, given in enumerate((*shared, *own)):
        for name, parameter in given.items():
            found = method.param(name)
            if found is None:
                raise ConfigError(f"{parameter.where}: {method.name} has no such parameter{suggest(name, known)}")
            if found.scope == "shared" and number >= len(shared):
                raise ConfigError(f"{parameter.where}: shared by all models; move it to the top-level parameters")
            for value in parameter.scalars():
                found.convert(value, parameter.where)
    for param in method.params:
        for section in sections:
            for part in section.slices:
                scopes = (part.parameters, section.parameters, config.parameters)
                if param.required and not any(param.name in scope for scope in scopes):
                    _check_given(param, method, part, _base(config, method, part))


def _check_given(param: Param, method: Method, part: Slice, base: int | None) -> None:
    """Refuse a slice whose entries do not all have a parameter that none of the places for all of them has."""
    if param.scope == "shared":
        raise ConfigError(f"parameters.{param.name}: missing; {param.doc}")
    for i, entry in enumerate(part.entries):
        if param.name not in entry.parameters and (param.scope == "model" or i != base):
            raise ConfigError(f"{entry.ref}: {param.name}: missing; {param.doc}")


def _tokenizer_apart(config: MergeConfig, refs: list[ModelRef]) -> ModelRef | None:
    """Where the tokenizer comes from, if that is none of the models."""
    source = None if config.tokenizer is None else config.tokenizer.source
    return None if source is None or any(same_model(source, other) for other in refs) else source


def _check_tokens(config: MergeConfig, refs: list[ModelRef]) -> None:
    """Refuse the row of a token of a model that is not merged."""
    for rule in () if config.tokenizer is None else config.tokenizer.tokens.values():
        if rule.model is not None and not any(same_model(rule.model, other) for other in refs):
            raise ConfigError(
                f"{rule.where}.source: {rule.model} is none of the models; expected one of {', '.join(map(str, refs))}"
            )


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
    # What an unfinished merge has taken is gone on with, or removed.
    free = shutil.disk_usage(existing).free + reserved(target)
    if needed > free:
        raise TargetError(
            f"{target}: the output needs {format_size(needed)}, {format_size(free)} are free; make room", fault=True
        )


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


def _embedding(model: Model, head: Source, free: bool = False) -> Source | None:
    """The input embedding that a head of this shape may be tied to; ``free``: with another number of rows."""
    for tensor in model.embeddings:
        if tensor.shape == head.shape or (free and _same_rows(tensor, head)):
            return tensor
    return None


def _same_rows(a: Source, b: Source) -> bool:
    """True if two tensors differ in the number of rows at most."""
    return len(a.shape) == len(b.shape) and (a.shape[1:] == b.shape[1:] or a.shape[0] == b.shape[0] == 1)


def _memory(tensor: Source) -> tuple[int, int] | None:
    """What two tensors of a ``.bin`` checkpoint have in common that are one memory (tied weights); None elsewhere."""
    return tensor.checkpoint.memory(tensor.name) if isinstance(tensor, StoredTensor) else None


def _one_memory(x: Source, y: Source) -> bool:
    return _memory(x) is not None and _memory(x) == _memory(y)


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


def _tensor_names(
    views: Sequence[_View], lead: int, vocabulary: Collection[str], notes: list[str]
) -> dict[str, tuple[Source, ...]]:
    """Every output tensor with its source in each model; nothing is left out without a note or an error. Those named
    in ``vocabulary`` may have other numbers of rows."""
    models = [v.model for v in views]
    stored = [dict(v.tensors) for v in views]
    everywhere = set.intersection(*(set(s) for s in stored))
    for view, tensors in zip(views, stored):
        model, shared = view.model, _memories(view.tensors, everywhere)
        for name in list(tensors):
            if name not in everywhere and _ends(name, RECOMPUTED):
                del tensors[name]
                notes.append(f"{name} of {model.ref}: left out, transformers computes it")
            elif _ends(name, HEADS) and _ties(models[lead], name) and _is_copy(model, tensors[name]):
                del tensors[name]
                notes.append(f"{name} of {model.ref}: left out, it is the tied input embedding")
            elif name not in everywhere and (twin := _twin(tensors[name], shared)):
                del tensors[name]
                notes.append(f"{name} of {model.ref}: left out, it is {twin} again")
    found: dict[str, tuple[Source, ...]] = {}
    for name in stored[lead]:
        found[name] = tuple(_find(models, stored, lead, i, name, name in vocabulary) for i in range(len(models)))
    for tensors in stored:
        extra = [name for name in tensors if name not in stored[lead]]
        if extra:
            where = tensors[extra[0]].file
            raise CheckpointError(
                f"{where}: tensor {extra[0]}{_more(extra)} is not in {models[lead].ref}; {SAME_TENSORS}"
            )
    return found


def _memories(tensors: Mapping[str, Source], names: Collection[str]) -> dict[tuple[int, int], list[Source]]:
    """Those of the tensors in ``names`` that lie in ``.bin`` files, by their memory."""
    found: dict[tuple[int, int], list[Source]] = {}
    for name, tensor in tensors.items():
        if name in names and (memory := _memory(tensor)) is not None:
            found.setdefault(memory, []).append(tensor)
    return found


def _twin(tensor: Source, shared: Mapping[tuple[int, int], Sequence[Source]]) -> str | None:
    """Which other tensor one of a ``.bin`` file is one memory with: it stores tied tensors under every name. What a
    head is tied to is decided elsewhere."""
    memory = _memory(tensor)
    if memory is None or _ends(tensor.name, HEADS):
        return None
    return next((other.name for other in shared.get(memory, ()) if _same_bytes(tensor, other)), None)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _find(models: list[Model], stored: list[dict[str, Source]], lead: int, i: int, name: str, free: bool) -> Source:
    """The source of a tensor in model i. ``free``: its number of rows need not be that of the lead."""
    wanted = stored[lead][name]
    if name not in stored[i]:
        if _ends(name, HEADS) and _ties(models[i], name):
            embedding = _embedding(models[i], wanted, free)
            if embedding is not None:
                return embedding
        missing = [n for n in stored[lead] if n not in stored[i]]
        raise CheckpointError(
            f"{models[i].ref}: tensor {name}{_more(missing)} is missing, {wanted.file} has it; {SAME_TENSORS}"
        )
    tensor = stored[i][name]
    if tensor.shape != wanted.shape and not (free and _same_rows(tensor, wanted)):
        vocabulary = _ends(name, (*HEADS, *EMBEDDINGS))
        remedy = (
            "vocabularies differ: add tokenizer_source: base, or union for the tokens of all models"
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


def _tensor(config: MergeConfig, method: Method, target: _Target, role: TensorRole | None) -> TensorPlan:
    name, sources, base = target.name, target.sources, target.base
    inputs = tuple(Spec(s.shape, s.dtype) for s in sources)
    merged = [s for s in sources if s.dtype.mergeable]
    if len(merged) < len(sources):
        return _copy(name, sources, inputs, base)
    stored = dtypes.promote(list(target.stored))
    if config.dtype is not None:
        compute = config.dtype
    else:
        compute = stored if config.compat == "mergekit" else dtypes.arithmetic(stored)
    out_dtype = config.out_dtype or config.dtype or stored
    group = Group(name, inputs, base, compute, out_dtype, config.seed, config.compat == "mergekit")
    arguments: dict[str, Any] = {}
    for param in method.params:
        if param.scope == "shared":
            arguments[param.key] = _lookup(param, target.scopes, name, target.depth, f"parameters.{param.name}")
        else:
            chosen = range(len(sources)) if param.scope == "model" else group.experts
            arguments[param.key] = [
                _lookup(
                    param,
                    (target.entries[i].parameters, *target.scopes),
                    target.own[i],
                    target.depth,
                    f"{target.entries[i].ref}: {param.name}",
                )
                for i in chosen
            ]
    method.check_arguments(group, arguments)
    rule = method.describe(role, inputs[0].shape, arguments) if role is not None and method.describe is not None else ""
    unit = method.unit(inputs[0].shape, arguments) if method.unit is not None else 1
    return TensorPlan(group, sources, arguments, copy=False, unit=unit, role=role, rule=rule)


def _lookup(param: Param, scopes: Sequence[Mapping[str, Parameter]], name: str, depth: float, where: str) -> Any:
    for scope in scopes:
        if param.name in scope:
            value = scope[param.name].at(name, depth, param.kind)
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
