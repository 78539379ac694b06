"""Which tensors of a checkpoint a part of the recipe is about: modules, layers, and what comes before and after them.

Everything is found from the names of the tensors. A module is one of the models that a checkpoint is made of: the
language model and the towers beside it, or encoder and decoder. A slice takes some layers of a module and gives them
numbers of their own; what comes before the layers belongs to the first slice, what comes after them to the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from seme.config import suggest
from seme.errors import CheckpointError, ConfigError
from seme.roles import layer, layers

_PARTS = {
    "multi_modal_projector": (
        *("multi_modal_projector", "mm_projector", "merger", "deepstack_merger_list", "connector", "aligner"),
        "embed_vision",
    ),
    "vision_tower": ("vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder"),
    "audio_tower": ("audio_tower", "audio_encoder", "audio_model"),
}
"""Modules beside a language model, and the parts of tensor names that they are known by; the first that matches."""

TEXT, ENCODER, DECODER, SHARED, WHOLE = "text_decoder", "encoder", "decoder", "shared", "default"

_BEFORE = re.compile(
    r"embed|embd|(?:^|\.)w[tp]e\.|rotary|relative_p|position|token_type|patch|_pre\.|(?:^|\.)pre_la?yr?norm"
    r"|(?:^|\.)(?:conv\d|class_token|cls_token)"
)
"""Tensors before the layers: embeddings of tokens, positions and patches with their norms."""

_AFTER = re.compile(r"(?:^|\.)(?:embed_out|lm_head|predictions|score|classifier|output)\b")
"""Heads, some of which are called embeddings."""


def modules(names: Iterable[str]) -> dict[str, str]:
    """The module of every tensor.

    One of ``multi_modal_projector``, ``vision_tower``, ``audio_tower`` and ``text_decoder`` where a language model has
    such a tower; ``encoder``, ``decoder`` and ``shared`` where there are layers of both; else ``default``.
    """
    names = list(names)
    found = {name: _tower(name) for name in names}
    stacks = [stack.split(".") for stack in layers(names)]
    rest = TEXT if any(found.values()) else WHOLE
    coupled = rest == WHOLE and any(ENCODER in s for s in stacks) and any(DECODER in s for s in stacks)

    def other(name: str) -> str:
        if not coupled:
            return rest
        return next((m for m in (ENCODER, DECODER) if m in name.split(".")), SHARED)

    return {name: module or other(name) for name, module in found.items()}


def _tower(name: str) -> str | None:
    parts = name.split(".")
    for module, known in _PARTS.items():
        if not set(parts).isdisjoint(known) or any(p.startswith("mm_input_projection") for p in parts):
            return module
    return None


def is_all(wanted: Iterable[str | None]) -> bool:
    """True if the recipe's modules are one that is everything.

    It has no name then, or ``default``, mergekit's name for the only module of an architecture that it infers.
    """
    return list(wanted) in ([None], [WHOLE])


def choose(wanted: Sequence[tuple[str, str]], found: Mapping[str, str]) -> list[str]:
    """The modules that the recipe's sections, (name, place in the recipe), are about.

    Args:
        wanted: the recipe's sections, (name, place in the recipe). ``vision_model`` and the like are taken for the
            module whose tensors are called so.
        found: the module of every tensor.

    Raises:
        ConfigError: a name is none of them, one is named twice, or one is left out.
    """
    there = list(dict.fromkeys(found.values()))
    chosen = []
    for name, where in wanted:
        module = name if name in there else _alias(name, found)
        if module is None:
            raise ConfigError(f"{where}: the model has no such module{suggest(name, there)}")
        if module in chosen:
            raise ConfigError(f"{where}: the module {module} is given twice; remove one")
        chosen.append(module)
    left = [m for m in there if m not in chosen]
    if left:
        raise ConfigError(f"modules.{left[0]}: missing, and nothing is left out; add it with models or slices")
    return chosen


def _alias(name: str, found: Mapping[str, str]) -> str | None:
    return next((module for tensor, module in found.items() if name in tensor.split(".")), None)


def before(name: str) -> bool:
    """True if a tensor outside of the layers comes before them, and so belongs to the first slice."""
    return _BEFORE.search(name) is not None and _AFTER.search(name) is None


class LayerIndex:
    """The tensors of a module by layer, so that a slice need not look at all of them.

    Attributes:
        names: all of them, in the order given.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.stacks = layers(self.names)
        self._of: dict[int | None, list[tuple[int, str]]] = {}  # with places in the order
        for place in enumerate(self.names):
            found = layer(place[1])
            self._of.setdefault(None if found is None else found[1], []).append(place)

    def count(self, where: str) -> int:
        """Number of layers.

        Raises:
            ConfigError: there are several stacks of them.
        """
        if len(self.stacks) > 1:
            listed = ", ".join(f"{s} ({n})" for s, n in self.stacks.items())
            raise ConfigError(f"{where}: the model has several stacks of layers: {listed}; write modules, or models")
        return next(iter(self.stacks.values()), 0)

    def moved(self, span: range, start: int, first: bool, last: bool) -> dict[str, str]:
        """What a slice takes of the one stack: by the name in the output, the name in the model.

        Args:
            span: the layers.
            start: number of the first of them in the output.
            first: what comes before the layers belongs to it.
            last: what comes after them belongs to it.
        """
        taken = [(at, name, name) for at, name in self._of.get(None, ()) if (first if before(name) else last)]
        stack = next(iter(self.stacks), "")
        prefix = f"{stack}." if stack else ""
        for i in span:
            skip, number = len(f"{prefix}{i}"), start + i - span.start
            taken += [(at, f"{prefix}{number}{name[skip:]}", name) for at, name in self._of.get(i, ())]
        return {new: name for _, new, name in sorted(taken)}


# --- config.json -----------------------------------------------------------------------------------------------------

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
_OF_ENCODER = ("encoder_layers", "num_encoder_layers", *_COUNTS)
_OF_DECODER = ("decoder_layers", "num_decoder_layers")
TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
"""Where the config.json of a multimodal model describes its language model."""

_NESTED = {
    TEXT: TEXT_CONFIGS,
    "vision_tower": ("vision_config",),
    "audio_tower": ("audio_config",),
}
_NUMBERS = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "hybrid_layer_ids", "cross_attention_layers")
"""Lists of the numbers of some layers."""


def with_layers(
    config: Mapping[str, Any], module: str, origin: Sequence[tuple[Mapping[str, Any], int]]
) -> dict[str, Any]:
    """config.json for other layers: their count, and lists with an entry per layer.

    Args:
        config: contents of config.json.
        module: the module whose layers they are.
        origin: of every layer of the output: the config.json of the model that it comes from, and its number there.

    Raises:
        CheckpointError: no entry says how many layers there are.
    """
    key = next((k for k in _NESTED.get(module, _NESTED[TEXT]) if isinstance(config.get(k), Mapping)), None)
    part = config if key is None else config[key]
    counts = {ENCODER: _OF_ENCODER, DECODER: _OF_DECODER}.get(module, _COUNTS)
    known = [k for k in counts if isinstance(part.get(k), int)]
    if not known and module == DECODER and any(isinstance(part.get(k), int) for k in _OF_ENCODER):
        known = ["num_decoder_layers"]  # T5 without it takes the encoder's
    if not known:
        raise CheckpointError(
            f"config.json: none of {', '.join(counts)} says how many layers the {module} has; add one for slices"
        )
    sources = [(c if key is None else c.get(key, {}), i) for c, i in origin]
    total = part.get(known[0], 0)
    changed = {**part, **dict.fromkeys(known, len(origin))}
    for name, value in part.items():
        if not isinstance(value, list) or not value or ("layer" not in name and name not in _NUMBERS):
            continue
        if len(value) == total and name not in _NUMBERS:
            changed[name] = [_entry(source.get(name), i, value) for source, i in sources]
        elif name in _NUMBERS:
            changed[name] = [j for j, (source, i) in enumerate(sources) if i in source.get(name, ())]
    return changed if key is None else {**config, key: changed}


def _entry(listed: Any, i: int, fallback: Sequence[Any]) -> Any:
    """Entry of layer i of the model it comes from, else of the donor's."""
    for values in (listed, fallback):
        if isinstance(values, list) and i < len(values):
            return values[i]
    return fallback[-1]
