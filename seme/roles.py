"""What each tensor of a checkpoint is to the latent space, the residual stream of width ``hidden_size``.

A layer *reads* the stream with the matrices whose inputs are its vectors (query, key, value, gate, up, router) and
*writes* it with those whose outputs are added to it (attention output, MLP down). The role of a tensor is decided by
the first of these that says something:

1. the recipe, entry by entry (:func:`parse`);
2. its name, as the common families of transformers give it;
3. its shape: a matrix with one axis of ``hidden_size`` reads or writes on that side.

What none of them knows is ``other``; every tensor gets a role, none is left out.

Matrices are thought of as [out, in]. Some are stored the other way round: GPT-2's Conv1D, the experts of Llama 4 and
gpt-oss. That is read from the shapes: all layers of a checkpoint store their matrices in one way, and the width of the
stream or the length of a bias shows in which.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from math import prod
from typing import Any, Literal

from seme.config import suggest
from seme.errors import CheckpointError, ConfigError, brief
from seme.patterns import TooSlow, search

Shapes = Mapping[str, tuple[int, ...]]


class Role(str, Enum):
    """What a tensor is to the residual stream.

    Attributes:
        READS: a matrix whose inputs are vectors of the stream.
        WRITES: a matrix whose outputs are vectors of the stream.
        VOCABULARY: input embedding [v, d]: one row per label, looked up.
        HEAD: output embedding [v, d] with storage of its own: one row per label, multiplied with the stream.
        NORM: gain of a norm.
        BIAS: added to activations: biases of linear layers, norms and routers.
        OTHER: everything else: tables of positions, convolutions, matrices between inner spaces, buffers, unknown ones.
    """

    READS = "reads"
    WRITES = "writes"
    VOCABULARY = "vocabulary"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    OTHER = "other"

    def __str__(self) -> str:
        return self.value


_MATRIX_ROLES = (Role.READS, Role.WRITES, Role.VOCABULARY, Role.HEAD)


@dataclass(frozen=True)
class TensorRole:
    """The role of one tensor and how its storage is seen as matrices [out, in].

    Attributes:
        role: what it is to the stream.
        transposed: the last two axes are stored as [in, out].
        batch: leading axes that count independent matrices: 1 for stacked experts, else 0.
        latent_axis: the side of [out, in] that is the stream: ``in`` for what reads, ``out`` for what writes, ``in``
            for vocabulary and head, whose rows are latent vectors (not in OPT-350m, where they are narrower and this
            is None); None otherwise.
        source: what decided: the recipe, the name, or the shape (``structure``).
    """

    role: Role
    transposed: bool = False
    batch: int = 0
    latent_axis: Literal["in", "out"] | None = None
    source: Literal["name", "structure", "recipe"] = "name"

    def matrices(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """How many matrices a tensor of this shape holds, and their (out, in); axes after the first are flattened.

        A vector counts as one column: (1, n, 1), a scalar as (1, 1, 1).
        """
        count, rest = prod(shape[: self.batch]), shape[self.batch :]
        rows, columns = (rest[0], prod(rest[1:])) if rest else (1, 1)
        return (count, columns, rows) if self.transposed else (count, rows, columns)

    def __str__(self) -> str:
        """E.g. ``reads, transposed, stacked (structure)``, as the plan shows it."""
        flags = [", transposed"] * self.transposed + [", stacked"] * bool(self.batch)
        return f"{self.role}{''.join(flags)} ({self.source})"


@dataclass(frozen=True)
class Override:
    """One entry of the recipe's ``roles``.

    Attributes:
        filter: regular expression, searched in the tensor's name; ``*`` matches every tensor.
        role: the role of every tensor that matches.
        transposed: stored as [in, out]; None: as shapes and the other tensors say.
        batch: leading axes that count matrices; None: as for a tensor that the recipe does not mention.
        where: path of the entry, for messages.
    """

    filter: str
    role: Role
    transposed: bool | None = None
    batch: int | None = None
    where: str = "roles"


def _about(overrides: Sequence[Override], names: Collection[str]) -> list[Collection[str]]:
    """The tensors that each entry matches.

    Raises:
        ConfigError: an expression whose search does not end.
    """
    searched = [o for o in overrides if o.filter != "*"]
    try:
        found = iter(search([o.filter for o in searched], names))
    except TooSlow as e:
        slow = searched[e.number]
        raise ConfigError(
            f"{slow.where}.filter: {brief(slow.filter)}: the search for it in the tensors' names does not end; "
            "write it without repetitions of repetitions"
        ) from None
    return [names if o.filter == "*" else next(found) for o in overrides]


def parse(value: Any, where: str = "roles") -> tuple[Override, ...]:
    """The recipe's ``roles``: a list of entries, of which the first that matches a tensor's name holds.

    .. code-block:: yaml

        roles:
          - {filter: 'mixer\\.in_proj', role: reads}
          - {filter: 'mixer\\.experts', role: writes, transposed: true, batch: 1}

    Args:
        value: what the recipe has; None is no entry.
        where: path of the list in the recipe.

    Raises:
        ConfigError: not such a list, an unknown key or role, a filter that is no regular expression.
    """
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list of {{filter: TEXT, role: ROLE}}, found {brief(value)}")
    return tuple(_entry(entry, f"{where}[{i}]") for i, entry in enumerate(value))


def _entry(entry: Any, where: str) -> Override:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected {{filter: TEXT, role: ROLE}}, found {brief(entry)}")
    keys = ("filter", "role", "transposed", "batch")
    for key in entry:
        if key not in keys:
            name = key[:100] if isinstance(key, str) else brief(key)
            raise ConfigError(f"{where}.{name}: unknown key{suggest(name, keys)}")
    text, role = entry.get("filter"), entry.get("role")
    transposed, batch = entry.get("transposed"), entry.get("batch")
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{where}.filter: {brief(text)}: expected part of a tensor's name, or a regular expression")
    try:
        if text != "*":
            re.compile(text)
    except (re.error, RecursionError, OverflowError) as e:
        raise ConfigError(f"{where}.filter: {brief(text)}: not a regular expression: {e}") from e
    known = [r.value for r in Role]
    if role not in known:
        shown = suggest(role[:100], known) if isinstance(role, str) else f"; known: {', '.join(known)}"
        raise ConfigError(f"{where}.role: {brief(role)}: no such role{shown}")
    if not isinstance(transposed, (bool, type(None))):
        raise ConfigError(f"{where}.transposed: {brief(transposed)}: expected true or false")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 0):
        raise ConfigError(f"{where}.batch: {brief(batch)}: expected the number of leading axes, 0 or more")
    return Override(text, Role(role), transposed, batch, where)


def _rule(*patterns: str) -> re.Pattern[str]:
    """Matches the end of a path; ``^`` ties a pattern to its start."""
    ends = "|".join(p if p.startswith("^") else rf"(?:^|\.){p}" for p in patterns)
    return re.compile(rf"(?:{ends})$")


# Rules for the path of a tensor (see _path), of at most three parts. The first that matches holds.
_NAMES: tuple[tuple[Role, re.Pattern[str]], ...] = (
    (
        Role.OTHER,
        _rule(
            r"wpe",
            r"position_embeddings?",
            r"embed_positions",
            r"positions_embed",
            r"token_type_embeddings",
            r"relative_attention_bias",
            r"rel_embeddings",
            r"position_ids",
            r"token_type_ids",
            r"rotary_emb\.\w+",
            r"masked_bias",
            r"conv1d",
            r"A_log",
            r"D",
            r"sinks",
            # Behind a pooler or another transform of the stream:
            r"seq_relationship",
            r"(?:classifier|classification_head)\.out_proj",
            r"multi_modal_projector\.linear_1",  # LLaVA
        ),
    ),
    (
        Role.HEAD,
        _rule(
            r"lm_head",  # Llama, Mistral, Qwen, Gemma, Phi, GPT-2, OPT, Falcon, T5
            r"lm_head\.decoder",  # RoBERTa
            r"predictions\.decoder",  # BERT
            r"embed_out",  # GPT-NeoX
            r"vocab_projector",  # DistilBERT
            r"output_layer",
            r"shared_head\.head",
            r"^decoder",  # ModernBERT
            r"^output",  # Llama as Meta stores it
            r"^proj_out",  # Whisper
        ),
    ),
    (
        Role.VOCABULARY,
        _rule(
            r"embed_tokens",
            r"embed_tokens_per_layer",  # Gemma 3n
            r"wte",
            r"word_embeddings?",
            r"embed_in",
            r"tok_embeddings",
            r"tokens_embed",
            r"token_embedding",
            r"shared",
            r"backbone\.embeddings?",
        ),
    ),
    (
        Role.READS,
        _rule(
            r"[qkv]_proj",
            r"qkv_proj",
            r"query_key_value",
            r"in_proj(?:_\w+)?",  # linear attention, state spaces, torch's MultiheadAttention
            r"(?:query|key|value)(?:_proj)?",
            r"[qkv]_lin",
            r"w(?:q|k|v|qkv)",
            r"W(?:qkv|i)",
            r"(?:\w*[aA]ttention|attn)\.[qkv]",  # T5
            r"input_linear",  # Granite's and JetMoE's experts
            r"[cq]_attn",
            r"q_a_proj",
            r"kv_a_proj_with_mqa",
            r"(?:gate|up|gate_up)_proj",
            r"c_fc",
            r"fc1",
            r"fc_in",
            r"lin1",
            r"dense_h_to_4h",
            r"wi(?:_[01])?",  # T5
            r"(?:experts(?:\.\d+)?|feed_forward)\.w[13]",  # Mixtral
            r"experts\.mlp\.[wv]1",  # DBRX
            r"ffn",
            r"(?:intermediate|pooler|transform|lm_head|head|classifier|classification_head)\.dense",
            r"gate",  # the router of a mixture of experts
            r"shared_expert_gate",
            r"router(?:\.layer|\.classifier|\.proj)?",
            r"project_out",  # OPT-350m, before its head
            r"vocab_transform",
            r"pre_classifier",
            r"classifier",
            r"score",
            r"qa_outputs",
        ),
    ),
    (
        Role.WRITES,
        _rule(
            r"(?:o|out|c|down)_proj",
            r"(?:output|\w*[aA]ttention|self_attn)\.dense",
            r"(?:\w*[aA]ttention|attn)\.o",  # T5
            r"(?:attention|self_attn)\.output",
            r"output_linear",
            r"out_lin",
            r"[wW]o",
            r"fc2",
            r"fc_out",
            r"lin2",
            r"dense_4h_to_h",
            r"(?:experts(?:\.\d+)?|feed_forward)\.w2",  # Mixtral
            r"experts\.mlp\.w2",  # DBRX
            r"ffn_output",
            r"project_in",  # OPT-350m, after its embedding
            r"embeddings_project",
            r"embedding_hidden_mapping_in",
            r"mm_input_projection",  # Gemma 3
            r"multi_modal_projector\.linear_2",  # LLaVA
        ),
    ),
)
_STORED_IN_OUT = _rule(r"mm_input_projection", r"experts\.mlp\.w2")
"""Transposed matrices in checkpoints that store the others as [out, in]: Gemma 3, DBRX."""

_NORM = re.compile(r"norm|(?:^|_)ln(?:_|\d|$)|^rms", re.IGNORECASE)
_TABLE = re.compile(r"(?:^|[._])embed(?:dings?)?(?:_\d+)?$")
"""Tables of embeddings that are not of the vocabulary: their rows are looked up, whatever their width."""

_EARLY_NORM = re.compile(r"embed(?!ding_norm)|emb_norm|norm_emb|projector|vision|visual|image|audio", re.IGNORECASE)
"""Norms of embeddings and of what comes before the language model (LFM2 calls its final norm embedding_norm)."""

_HEAD_NORM = re.compile(r"(?:^|\.)(?:predictions|lm_head|head|generator_predictions|vocab_layer_norm)\.")
_TOWERS = {
    *("vision_tower", "vision_model", "vision_encoder", "visual", "image_encoder"),
    *("audio_tower", "audio_encoder", "audio_model"),
}
"""Encoders beside a language model, with a latent space of their own."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "n_embed", "dim", "emb_dim")
_TEXT = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
_INDEX = re.compile(r"(?:^|\.)(\d{1,6})(?=\.|$)", re.ASCII)


def layer(name: str) -> tuple[str, int] | None:
    """Stack and index of the layer that a tensor lies in, e.g. ``("model.layers", 3)``; None outside of the layers."""
    match = _INDEX.search(name)
    return (name[: match.start()], int(match[1])) if match else None


def layers(names: Iterable[str]) -> dict[str, int]:
    """Number of layers of each stack, e.g. ``{"encoder.block": 12, "decoder.block": 12}``."""
    count: dict[str, int] = {}
    for stack, index in filter(None, map(layer, names)):
        count[stack] = max(count.get(stack, 0), index + 1)
    return count


def _path(name: str) -> str:
    """The end of a tensor's name that rules are about, without what only says that it is a weight."""
    path = name.removesuffix(".weight") if name.endswith(".weight") else name.removesuffix("_weight")
    return ".".join("0" if part.isdecimal() else part for part in path.rsplit(".", 3)[-3:])


@lru_cache(4096)  # a path is that of many layers and experts
def _by_rule(path: str) -> Role | None:
    return next((role for role, pattern in _NAMES if pattern.search(path)), None)


@lru_cache(4096)
def _stored_in_out(path: str) -> bool:
    return _STORED_IN_OUT.search(path) is not None


def _named(name: str, shape: tuple[int, ...], names: Shapes, towers: bool) -> Role | None:
    """The role that the name says, as far as the shape allows it."""
    *modules, leaf = name.split(".")
    if leaf in ("bias", "beta") or leaf.endswith("_bias"):
        # GPT-2's causal mask is called bias as well; stacked experts have one bias per expert.
        return Role.BIAS if len(shape) == 1 or (len(shape) == 2 and leaf != "bias") else Role.OTHER
    if modules and leaf in ("weight", "gamma", "scale") and len(shape) in (1, 2) and _NORM.search(modules[-1]):
        return Role.NORM
    path = _path(name)
    role = _by_rule(path)
    if towers and role in (None, *_MATRIX_ROLES) and not _TOWERS.isdisjoint(modules):
        return Role.OTHER
    if role is Role.READS and modules and path.endswith("classifier"):
        behind = ("pooler.dense.weight", "pre_classifier.weight")
        return Role.OTHER if any(n.endswith(behind) for n in names) else role
    return role


def _text(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The parts of config.json that may describe the language model, the innermost first."""
    parts = [config]
    while True:
        inner = next((parts[0][k] for k in _TEXT if isinstance(parts[0].get(k), Mapping)), None)
        if inner is None or len(parts) > 3:
            return tuple(parts)
        parts.insert(0, inner)


def number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of these entries that is a positive whole number."""
    found = (part.get(key) for part in _text(config) for key in keys)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def hidden_size(config: Mapping[str, Any], shapes: Shapes) -> int:
    """Width of the residual stream: as config.json says, else that of the embedding, else the commonest axis.

    0 if there is no matrix at all.
    """
    said = number(config, _WIDTHS)
    if said is not None:
        return said
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    embeddings = [s for n, s in matrices.items() if _named(n, s, shapes, bool(_text(config)[1:])) is Role.VOCABULARY]
    if embeddings:
        return embeddings[0][1]
    axes = Counter(n for shape in matrices.values() for n in set(shape))
    return max(axes, key=lambda n: (axes[n], n)) if axes else 0


@dataclass(frozen=True)
class _Structure:
    """What the shapes of a checkpoint say.

    ``transposed`` has the storage of most of its matrices, by the number of leading axes that count them.
    """

    width: int
    vocabulary: int | None
    experts: int | None
    shapes: Shapes
    transposed: Mapping[int, bool]

    def batch(self, name: str) -> int | None:
        """Leading axes that count matrices; None if the tensor is neither a matrix nor stacked experts."""
        shape = self.shapes[name]
        if len(shape) == 3 and ("experts" in name.split(".") or shape[0] == self.experts):
            return 1
        return 0 if len(shape) == 2 else None

    def bias_says(self, name: str) -> bool | None:
        """Whether the length of its bias shows a matrix to be transposed; None if it has none, or is square."""
        bias = self.shapes.get(f"{name.removesuffix('.weight')}.bias")
        rows, columns = self.shapes[name][-2:]
        if bias is None or rows == columns or bias not in ((rows,), (columns,)):
            return None
        return bias == (columns,)

    def is_transposed(self, name: str, batch: int, named: bool) -> bool:
        """Whether a matrix is stored as [in, out]; those outside of the layers, task heads for one, seldom are."""
        if _stored_in_out(_path(name)):
            return True
        said = self.bias_says(name) if batch == 0 else None
        if said is None:
            return self.transposed.get(batch, False) and not (named and layer(name) is None)
        return said


def _structure(config: Mapping[str, Any], shapes: Shapes, named: Mapping[str, Role | None]) -> _Structure:
    """Count how the matrices are stored."""
    width = hidden_size(config, shapes)
    found = _Structure(width, number(config, ("vocab_size",)), number(config, _EXPERTS), shapes, {})
    votes: Counter[int] = Counter()
    for name, role in named.items():
        batch = found.batch(name)
        if batch is None or role not in (Role.READS, Role.WRITES, None) or _stored_in_out(_path(name)):
            continue
        rows, columns = shapes[name][-2:]
        said = found.bias_says(name) if batch == 0 else None
        if said is None and role is not None and (rows == width) != (columns == width):
            said = (rows if role is Role.READS else columns) == width
        if said is not None:
            votes[batch] += 1 if said else -1
    return _Structure(width, found.vocabulary, found.experts, shapes, {b: n > 0 for b, n in votes.items()})


def roles(config: Mapping[str, Any], shapes: Shapes, overrides: Sequence[Override] = ()) -> dict[str, TensorRole]:
    """The role of every tensor.

    Args:
        config: contents of config.json; may be empty.
        shapes: every tensor of the checkpoint, in the order of its files.
        overrides: the recipe's entries, from :func:`parse`.

    Returns:
        One role per tensor, in the order of ``shapes``. What reads has an ``in`` axis of ``hidden_size``, what writes
        an ``out`` axis of it.

    Raises:
        ConfigError: an override matches no tensor, or a tensor of a shape that its role cannot have.
    """
    towers = len(_text(config)) > 1
    named = {name: _named(name, shape, shapes, towers) for name, shape in shapes.items()}
    structure = _structure(config, shapes, named)
    embedded = Role.VOCABULARY in named.values()
    found: dict[str, TensorRole] = {}
    used: set[int] = set()
    about = _about(overrides, shapes)
    for name in shapes:
        entry = next((i for i, names in enumerate(about) if name in names), None)
        if entry is not None:
            used.add(entry)
            found[name] = _overridden(name, overrides[entry], structure)
        else:
            found[name] = _decide(name, named[name], structure, embedded)
            embedded = embedded or found[name].role is Role.VOCABULARY
    for i, override in enumerate(overrides):
        if i not in used and not about[i]:
            raise ConfigError(f"{override.where}.filter: {brief(override.filter)} matches no tensor of the checkpoint")
    return found


def _decide(name: str, role: Role | None, structure: _Structure, embedded: bool) -> TensorRole:
    """The role of a tensor that the recipe does not mention."""
    batch = structure.batch(name)
    source: Literal["name", "structure"] = "structure" if role is None else "name"
    if role in (Role.VOCABULARY, Role.HEAD):
        if batch == 0:
            latent_axis: Literal["in"] | None = "in" if structure.shapes[name][1] == structure.width else None
            return TensorRole(role, latent_axis=latent_axis, source=source)
        return TensorRole(Role.OTHER, source="structure")
    if role not in (Role.READS, Role.WRITES, None):
        return TensorRole(role, source=source)
    if batch is None:
        return TensorRole(Role.OTHER, source="structure")
    rows, columns = structure.shapes[name][-2:]
    if role is None and batch == 0 and columns == structure.width and rows == structure.vocabulary != columns:
        return TensorRole(Role.HEAD if embedded else Role.VOCABULARY, latent_axis="in", source=source)
    if role is None and _TABLE.search(_path(name)):
        return TensorRole(Role.OTHER)
    transposed = structure.is_transposed(name, batch, role is not None)
    out, in_ = (columns, rows) if transposed else (rows, columns)
    if in_ == structure.width and role is not Role.WRITES:  # a square matrix without a name: most of them read
        return TensorRole(Role.READS, transposed, batch, "in", source)
    if out == structure.width and role is not Role.READS:
        return TensorRole(Role.WRITES, transposed, batch, "out", source)
    return TensorRole(Role.OTHER, transposed, batch, source="structure")


def _overridden(name: str, override: Override, structure: _Structure) -> TensorRole:
    """The role that the recipe gives, if the tensor's shape can have it."""
    shape, width, role, where = structure.shapes[name], structure.width, override.role, override.where
    batch = override.batch if override.batch is not None else structure.batch(name) or 0
    if batch and len(shape) - batch != 2:
        raise ConfigError(f"{where}.batch: {name} has shape {list(shape)}; {batch} leading axes do not leave a matrix")
    if len(shape) - batch != 2:
        if role in _MATRIX_ROLES or override.transposed:
            raise ConfigError(f"{where}: {name} has shape {list(shape)}; {role} needs a matrix")
        return TensorRole(role, source="recipe")
    linear = role in (Role.READS, Role.WRITES, Role.OTHER)
    transposed = linear and structure.is_transposed(name, batch, False)
    if override.transposed is not None:
        transposed = override.transposed
    rows, columns = shape[-2:]
    out, in_ = (columns, rows) if transposed else (rows, columns)
    side: Literal["in", "out"] | None = None
    if role in (Role.READS, Role.WRITES):
        side = "in" if role is Role.READS else "out"
        if (in_ if role is Role.READS else out) != width:
            raise ConfigError(
                f"{where}: {name} has shape {list(shape)}, stored as {'[in, out]' if transposed else '[out, in]'}; "
                f"what {role} has an {side} axis of hidden_size {width}; set transposed, or another role"
            )
    elif role in (Role.VOCABULARY, Role.HEAD) and in_ == width:
        side = "in"
    return TensorRole(role, transposed, batch, side, "recipe")


# --- the latent space ------------------------------------------------------------------------------------------------

_OFFSET_NORMS = {
    *("gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma", "vaultgemma", "t5gemma", "t5_gemma_module"),
    *("t5gemma2", "t5gemma2_text", "t5gemma2_decoder", "nemotron", "step3p5", "step3p7"),
    *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    *("minimax_m3_vl", "minimax_m3_vl_text"),
}
"""Model types whose final norm multiplies with 1 + its stored gain."""

_CENTRED_NORMS = {
    *("cohere", "cohere2", "cohere2_moe", "cohere2_vision", "dbrx", "modernbert", "modernbert-decoder", "mpt"),
}
"""Model types whose final norm is a LayerNorm without a bias, which the tensors alone do not tell from an RMSNorm."""


@dataclass(frozen=True)
class Latent:
    """The latent space of a checkpoint, and where its labels are.

    Attributes:
        hidden_size: width d of the residual stream.
        head: tensor [v, d] whose rows are the labels' directions on the output side.
        tied: no head is stored, and that tensor is the input embedding.
        final_norm: gain [d] of the norm whose output the head multiplies; None if there is none, or none is recognised.
        norm_offset: the gain is the stored tensor plus this: 1.0 for Gemma and its kin, else 0.0.
        norm_kind: ``layer`` if the norm subtracts the mean, ``rms`` if not, None without a norm.
    """

    hidden_size: int
    head: str
    tied: bool
    final_norm: str | None
    norm_offset: float
    norm_kind: Literal["rms", "layer"] | None = None


def latent(config: Mapping[str, Any], shapes: Shapes, overrides: Sequence[Override] = ()) -> Latent:
    """Find head, embedding and final norm of a checkpoint.

    A head that is stored counts whatever config.json says of ties: it is a copy of the embedding, or transformers uses
    it and ties nothing. Of encoder and decoder, the decoder's tensors are taken. In BERT and its kin the norm before
    the head is that of the head's transform, if it is stored.

    Args:
        config: contents of config.json; may be empty.
        shapes: every tensor of the checkpoint.
        overrides: the recipe's entries, from :func:`parse`; roles ``head``, ``vocabulary`` and ``norm`` count here.

    Raises:
        CheckpointError: neither a head nor an embedding has rows of ``hidden_size``.
        ConfigError: as for :func:`roles`.
    """
    found = roles(config, shapes, overrides)
    width = hidden_size(config, shapes)
    outside = [name for name in shapes if layer(name) is None and "mtp" not in name.split(".")]

    def of(role: Role) -> list[str]:
        """Tensors of a role outside of the layers, without an encoder's if the decoder has some as well."""
        names = [n for n in outside if found[n].role is role]
        return [n for n in names if "encoder" not in n.split(".")] or names

    heads = [n for n in of(Role.HEAD) if found[n].latent_axis == "in"]
    embeddings = [n for n in of(Role.VOCABULARY) if found[n].latent_axis == "in"]
    if not heads and not embeddings:
        others = [f"{n} {list(shapes[n])}" for n in shapes if found[n].role in (Role.HEAD, Role.VOCABULARY)]
        raise CheckpointError(
            f"no LM head or embedding with rows of hidden_size {width}; "
            + (f"found {', '.join(others[:3])}" if others else "name one under roles, as head or vocabulary")
        )
    norms = [n for n in of(Role.NORM) if shapes[n] == (width,) and not _EARLY_NORM.search(n)]
    norm = next((n for n in norms if _HEAD_NORM.search(n)), norms[-1] if norms else None)
    kinds = {said for part in _text(config) if isinstance(said := part.get("model_type"), str)}
    kind: Literal["rms", "layer"] | None = None
    if norm is not None:
        bias = re.sub(r"(weight|gamma|scale)$", "", norm)
        centred = f"{bias}bias" in shapes or f"{bias}beta" in shapes or not kinds.isdisjoint(_CENTRED_NORMS)
        kind = "layer" if centred else "rms"
    offset = 1.0 if norm is not None and not kinds.isdisjoint(_OFFSET_NORMS) else 0.0
    return Latent(width, (heads or embeddings)[0], not heads, norm, offset, kind)
