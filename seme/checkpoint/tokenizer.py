"""The tokenizer of a checkpoint: its files, the ids of its tokens, and a tokenizer with more or fewer tokens."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from seme.checkpoint.index import json_text, read_json
from seme.errors import CheckpointError, brief

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""Those of which a tokenizer has at least one."""

TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)

MODEL_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
)

OUTDATED = (*VOCABULARY_FILES, "added_tokens.json", "merges.txt")
"""What else says which tokens there are; not true any more beside another tokenizer.json."""

LEAST_LIMIT = 1 << 20
"""Ids below it are always accepted; above it only those below four times the number of tokens."""

_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""How the tokenizers library adds a token that is given as text."""


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token to id from ``tokenizer.json`` (added tokens included) or ``vocab.json``; None without either."""
    if (folder / "tokenizer.json").is_file():
        return _ids(read_json(folder / "tokenizer.json"), folder)
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    return None


def _ids(data: Mapping[str, Any], folder: Path) -> dict[str, int]:
    try:
        vocab: Any = data["model"]["vocab"]
        if isinstance(vocab, list):  # unigram: [[token, score], ...] in the order of ids
            vocab = {entry[0]: i for i, entry in enumerate(vocab)}
        found = {**vocab, **{token["content"]: token["id"] for token in data.get("added_tokens") or ()}}
        for token in data.get("added_tokens") or ():  # two may have one text
            _checked({token["content"]: token["id"]}, folder / "tokenizer.json")
    except (LookupError, TypeError) as e:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: no vocabulary that can be read in it") from e
    return _checked(found, folder / "tokenizer.json")


def _checked(ids: dict[Any, Any], where: Path) -> dict[str, int]:
    """A vocabulary whose tokens are text, with ids for which arrays can be made."""
    if not set(map(type, ids)) <= {str}:
        raise CheckpointError(f"{where}: token {brief(next(t for t in ids if type(t) is not str))} is no text")
    limit = max(LEAST_LIMIT, 4 * len(ids))
    if not set(map(type, ids.values())) <= {int} or (ids and not 0 <= min(ids.values()) <= max(ids.values()) < limit):
        token, i = next((t, i) for t, i in ids.items() if type(i) is not int or not 0 <= i < limit)
        raise CheckpointError(
            f"{where}: token {brief(token)} has id {brief(i)}; expected a whole number of at least 0 and below {limit}"
        )
    return ids


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a model.

    Attributes:
        folder: where its files are.
        ids: token to id, added tokens included.
        added: the added tokens as ``tokenizer.json`` describes them.
        data: contents of ``tokenizer.json``; None if they were not kept.
    """

    folder: Path
    ids: Mapping[str, int]
    added: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any] | None = None

    def changed(self, drop: Collection[str], add: Iterable[Mapping[str, Any]]) -> dict[str, str]:
        """Files of a tokenizer without some tokens and with others: contents by name.

        Args:
            drop: tokens to take out.
            add: entries of ``added_tokens`` with their ids.

        Raises:
            CheckpointError: tokens cannot be taken out of a tokenizer of this kind.
        """
        data = dict(_contents(self.folder) if self.data is None else self.data)
        model, dropped = dict(data["model"]), set(drop)
        data["model"] = model
        if dropped:
            if not isinstance(model["vocab"], dict):
                raise CheckpointError(
                    f"{self.folder}: its tokenizer has tokens without a row in the embedding, such as "
                    f"{min(dropped)!r}, and is of type {model.get('type')}, from which none can be taken; "
                    "name another model in tokenizer_source"
                )
            model["vocab"] = {t: i for t, i in model["vocab"].items() if t not in dropped}
            if "merges" in model:
                try:
                    model["merges"] = [m for m in model["merges"] if dropped.isdisjoint(_pair(m))]
                except TypeError as e:
                    raise CheckpointError(f"{self.folder / 'tokenizer.json'}: merges are no pairs of text") from e
        new = [dict(t) for t in add]
        gone = dropped | {t["content"] for t in new}
        kept = [t for t in self.added if t["content"] not in gone]
        data["added_tokens"] = sorted((*kept, *new), key=lambda t: t["id"])
        files = {"tokenizer.json": json_text(data)}
        settings = self.folder / "tokenizer_config.json"
        if settings.is_file():
            said = read_json(settings)
            if isinstance(said.get("added_tokens_decoder"), dict):
                known = {k: t for k, t in said["added_tokens_decoder"].items() if _content(t) not in dropped}
                known |= {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in new}
                files[settings.name] = json_text({**said, "added_tokens_decoder": known}, indent=2)
        return files


def added_token(content: str) -> dict[str, Any]:
    """The entry of a token that is added as text, without an id."""
    return {"content": content, **_ADDED}


def _content(token: Any) -> str | None:
    """The text of an entry of ``added_tokens_decoder``; None of what is none."""
    content = token.get("content") if isinstance(token, dict) else None
    return content if isinstance(content, str) else None


def _pair(merge: Any) -> list[str]:
    return merge.split(" ", 1) if isinstance(merge, str) else list(merge)


def read(folder: Path, keep: bool = False) -> Tokenizer | None:
    """The tokenizer in a folder, None if it has none.

    ``tokenizer.json`` is read here; others are loaded by transformers.

    Args:
        folder: of the model.
        keep: keep the contents, tens of megabytes, for :meth:`Tokenizer.changed`, which reads them again if not.

    Raises:
        CheckpointError: the files cannot be read.
    """
    there = [name for name in VOCABULARY_FILES if (folder / name).exists()]
    if not there:
        return None
    for name in there:
        if not os.path.isfile(folder / name):  # reading a pipe would never end
            raise CheckpointError(f"{folder / name}: not a file; download it again")
    data = _contents(folder)
    ids, added = _ids(data, folder), list(data.get("added_tokens") or ())
    settings = folder / "tokenizer_config.json"
    said = read_json(settings).get("added_tokens_decoder") if settings.is_file() else None
    for number, token in said.items() if isinstance(said, dict) else ():
        # Of files that were edited by hand; transformers adds what is missing.
        content = _content(token)
        if content is not None and content not in ids and number.isdecimal():
            if len(number) > 9:
                raise CheckpointError(f"{settings}: token {brief(content)} has id {brief(number)}, which is no token's")
            ids[content] = int(number)
            added.append({**_ADDED, **token, "id": int(number)})
    return Tokenizer(folder, _checked(ids, settings), added, data if keep else None)


def _contents(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    return read_json(file) if file.is_file() else _converted(folder)


@functools.lru_cache(4)
def _converted(folder: Path) -> dict[str, Any]:
    """``tokenizer.json`` as transformers writes it for a tokenizer that is stored in another way."""
    try:
        with tempfile.TemporaryDirectory() as made:
            auto = import_module("transformers").AutoTokenizer
            found = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            found.save_pretrained(made)
            return read_json(Path(made) / "tokenizer.json")
    except BaseException as e:  # a panic in the tokenizers library is no Exception
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        said = str(e).strip().partition("\n")[0][:200] or type(e).__name__
        raise CheckpointError(
            f"{folder}: transformers cannot read its tokenizer ({said}); save it there as tokenizer.json"
        ) from e
