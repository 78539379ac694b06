"""One vocabulary for models whose tokenizers differ: the output's tokenizer, and which row each model gives to a token.

Rows of embeddings, heads and their biases stand for tokens. The output has the tokens of one model, or those of all
(``union``); every model's rows are gathered in their order. A token that a model lacks gets, in this order, what the
recipe says, the row of the only model that has it, the base model's, the mean of those of the models that have it, or
zeros; so does mergekit. Rows that no token has (padding) are dropped, and added as the recipe says.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seme.checkpoint.hub import ModelRef, same_model
from seme.checkpoint.index import read_json
from seme.checkpoint.tokenizer import VOCABULARY_FILES, Tokenizer, added_token, read
from seme.config import TokenizerConfig, TokenRule
from seme.errors import CheckpointError, ConfigError
from seme.roles import Role, Shapes, layer, roles
from seme.sources import MEAN, PADDING, ZERO, Rows

if TYPE_CHECKING:
    import numpy as np

    Ids = np.ndarray[Any, np.dtype[np.int64]]

_HEAD_BIASES = ("predictions.bias", "lm_head.bias", "final_logits_bias", "vocab_projector.bias")


def vocabulary_tensors(config: Mapping[str, Any], shapes: Shapes) -> set[str]:
    """The tensors with a row (of biases: an element) per token."""
    found = {
        name
        for name, role in roles(config, shapes).items()
        if role.role in (Role.VOCABULARY, Role.HEAD) and layer(name) is None
    }
    sizes = {shapes[name][0] for name in found}
    for name, shape in shapes.items():
        of_head = name.endswith(_HEAD_BIASES) or f"{name.removesuffix('bias')}weight" in found
        if of_head and name.endswith("bias") and shape and shape[-1] in sizes and len(shape) <= 2:
            found.add(name)
    return found


def rows_of(shape: tuple[int, ...]) -> int:
    """Tokens that a tensor of the vocabulary has rows for; a bias may be a table of one row."""
    return shape[1] if len(shape) == 2 and shape[0] == 1 else shape[0]


@dataclass(frozen=True)
class Alignment:
    """The output's vocabulary, and where each model has its tokens.

    Attributes:
        config: what the recipe says.
        refs: the models.
        ids: of the output: token to id.
        places: for each model, the row of each id of the output, -1 for a token that it does not have.
        originals: for each model, token to id as its tokenizer has it.
        rows: of the output.
        folder: of the tokenizer that the output's is or is made from.
        files: contents of the files in which it differs from that; empty if they are taken as they are.
        notes: what is worth telling.
    """

    config: TokenizerConfig
    refs: Sequence[ModelRef]
    ids: Mapping[str, int]
    places: Sequence[Ids]
    originals: Sequence[Mapping[str, int]]
    rows: int
    folder: Path
    files: Mapping[str, str]
    notes: tuple[str, ...]
    _cache: dict[Any, list[Rows | None]] = field(default_factory=dict)

    def sources(self, models: tuple[int, ...], base: int | None, counts: tuple[int, ...]) -> list[Rows | None]:
        """Where the rows of these models' tensors come from, by position in ``models``; None if they stay as they are.

        Args:
            models: numbers of the models that have the tensor.
            base: which of them is the base model.
            counts: rows that each of them has.

        Raises:
            ConfigError: the recipe takes a token from a model that does not have it.
        """
        key = models, base, counts
        if key not in self._cache:
            self._cache[key] = self._sources(models, base, counts)
        return self._cache[key]

    def _sources(self, models: tuple[int, ...], base: int | None, counts: tuple[int, ...]) -> list[Rows | None]:
        import numpy as np

        places = np.stack([np.where(self.places[m] < n, self.places[m], -1) for m, n in zip(models, counts)])
        has = places >= 0
        owners = has.sum(0)
        size = len(owners)
        origin = np.where(owners == 0, ZERO, MEAN)
        if base is not None:
            origin[has[base]] = base
        origin[owners == 1] = has.argmax(0)[owners == 1]
        first = np.where(origin >= 0, places[np.maximum(origin, 0), np.arange(size)], 0)
        forced = np.zeros(size, dtype=bool)
        for token, rule in self.config.tokens.items():
            i = self.ids[token]
            if rule.decides and (rule.force or not has[:, i].all()):
                origin[i], first[i] = self._given(rule, token, models, places, counts)
                forced[i] = rule.force
        wanted = ~has.all(0) | forced  # by some model
        means = {
            int(i): [(m, int(places[m, i])) for m in range(len(models)) if has[m, i]]
            for i in np.flatnonzero((origin == MEAN) & wanted)
        }
        return [
            self._rows(np.where(has[m] & ~forced, m, origin), np.where(has[m] & ~forced, places[m], first), m, n, means)
            for m, n in enumerate(counts)
        ]

    def _given(
        self, rule: TokenRule, token: str, models: tuple[int, ...], places: Ids, counts: tuple[int, ...]
    ) -> tuple[int, int]:
        """Origin and row of a token as the recipe says."""
        where, ref = f"{rule.where}.source", rule.model
        if ref is None:
            return ZERO, 0
        m = next((k for k, model in enumerate(models) if same_model(self.refs[model], ref)), None)
        if m is None:
            raise ConfigError(f"{where}: {ref} is none of the models that are merged there; name one of them")
        row = int(places[m, self.ids[token]])
        if rule.token is not None:
            token = str(rule.token)
            row = self.originals[models[m]].get(token, -1) if isinstance(rule.token, str) else rule.token
        if not 0 <= row < counts[m]:
            raise ConfigError(f"{where}: {ref} has no token {token!r}; name another token or model, or kind: zero")
        return m, row

    def _rows(
        self, origin: Ids, first: Ids, own: int, count: int, means: Mapping[int, list[tuple[int, int]]]
    ) -> Rows | None:
        """Runs of rows that follow each other in one model; None for all of ``own`` as they are."""
        import numpy as np

        size, index = len(origin), np.arange(len(origin))
        if size == count == self.rows and bool((origin == own).all()) and bool((first == index).all()):
            return None
        follows = (origin[1:] == origin[:-1]) & ((first[1:] == first[:-1] + 1) | (origin[1:] == ZERO))
        begins = np.concatenate([np.ones(min(size, 1), dtype=bool), ~follows | (origin[1:] == MEAN)])
        starts = np.flatnonzero(begins)
        ends, origins, firsts = [*starts.tolist(), size], origin[starts].tolist(), first[starts].tolist()
        if size < self.rows:
            ends, origins, firsts = [*ends, self.rows], [*origins, PADDING], [*firsts, 0]
        return Rows(ends, origins, firsts, {i: m for i, m in means.items() if origin[i] == MEAN})


def align(
    config: TokenizerConfig,
    refs: Sequence[ModelRef],
    folders: Sequence[Path],
    counts: Sequence[int],
    donor: int,
    apart: Path | None = None,
) -> Alignment:
    """The output's vocabulary for these models.

    Args:
        config: what the recipe says.
        refs: the models.
        folders: their folders.
        counts: rows of their embeddings.
        donor: which of them is the base model, or takes its place.
        apart: folder of the tokenizer that the output gets, if that is of none of them.

    Raises:
        CheckpointError: a tokenizer that is needed is missing or cannot be read.
    """
    source, models = config.source, len(refs)
    if apart is not None:
        chosen, folders, counts = models, [*folders, apart], [*counts, _tokens(apart)]
    else:
        chosen = donor if source is None else next(i for i, r in enumerate(refs) if same_model(r, source))
    found = [read(folder, keep=i == chosen) for i, folder in enumerate(folders)]
    notes = [
        f"{ref}: no tokenizer in it, taken to number its tokens as {refs[donor]} does"
        for ref, tokenizer in zip(refs, found)
        if tokenizer is None
    ]
    for needed in (donor, chosen):
        if found[needed] is None:
            raise CheckpointError(
                f"{folders[needed]}: no tokenizer in it, such as {VOCABULARY_FILES[0]}; "
                f"name a model that has one in {config.where}, or leave it out"
            )
    tokenizers = [t for t in (t or found[donor] for t in found) if t is not None]
    ids, files = _output(config, tokenizers, counts, chosen)
    size = max(max(ids.values(), default=-1) + 1, len(ids))
    originals = [t.ids for t in tokenizers[:models]]
    places = _places(ids, originals, size)
    unit = config.pad_to_multiple_of
    return Alignment(
        config,
        refs,
        ids,
        places,
        originals,
        -(-size // unit) * unit,
        folders[chosen],
        files,
        tuple(notes),
    )


def _tokens(folder: Path) -> int:
    """How many tokens a model has rows for, by its config.json; without one, as many as there can be."""
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    text = config.get("text_config")
    found = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return found if isinstance(found, int) else sys.maxsize


def _places(ids: Mapping[str, int], models: Sequence[Mapping[str, int]], size: int) -> list[Ids]:
    """For each model, the row of each id; models of one tokenizer share them."""
    import numpy as np

    count = len(ids)
    numbers = np.fromiter(ids.values(), np.int64, count)
    found: dict[int, Ids] = {}
    for own in models:
        if id(own) not in found:
            found[id(own)] = np.full(size, -1, dtype=np.int64)
            found[id(own)][numbers] = np.fromiter(map(own.get, ids, itertools.repeat(-1)), np.int64, count)
    return [found[id(own)] for own in models]


def _output(
    config: TokenizerConfig, tokenizers: Sequence[Tokenizer], counts: Sequence[int], chosen: int
) -> tuple[dict[str, int], dict[str, str]]:
    """The output's tokens with their ids, and the files that say so; none if they are those of ``chosen``."""
    base = tokenizers[chosen]
    drop = [t for t, i in base.ids.items() if i >= counts[chosen]]
    ids = {t: i for t, i in base.ids.items() if i < counts[chosen]} if drop else dict(base.ids)
    free = itertools.count(max(ids.values(), default=-1) + 1)
    add: list[dict[str, Any]] = []

    def append(entry: Mapping[str, Any]) -> None:
        token = entry["content"]
        if token not in ids:
            ids[token] = next(free)
        add.append({"id": ids[token], **entry})

    if config.source is None:
        added = [{t["content"]: t for t in tokenizer.added} for tokenizer in tokenizers]
        known = set().union(*added)
        order = [chosen, *(i for i in range(len(tokenizers)) if i != chosen)]
        seen = set(ids)
        fresh: list[str] = []
        for m in order[1:]:
            own = tokenizers[m].ids
            if own is base.ids:
                continue
            new = [t for t in itertools.filterfalse(seen.__contains__, own) if t not in known and own[t] < counts[m]]
            fresh += sorted(new, key=own.__getitem__)
            seen.update(new)
        for token in fresh:
            append(added_token(token))
        taken = set(added[chosen])
        for m in order[1:]:
            for token, entry in added[m].items():
                if token not in taken and entry["id"] < counts[m]:
                    taken.add(token)
                    append({k: v for k, v in entry.items() if k != "id"})
    for token in config.tokens:
        if token not in ids:
            append(added_token(token))
    return ids, base.changed(drop, add) if drop or add else {}
