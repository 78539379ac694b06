"""The tokenizer of a checkpoint: its files, the ids of its tokens, and a tokenizer with more or fewer tokens."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from seme.checkpoint.index import read_json
from seme.errors import CheckpointError

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
        return {**vocab, **{token["content"]: token["id"] for token in data.get("added_tokens") or ()}}
    except (LookupError, TypeError) as e:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: no vocabulary that can be read in it") from e


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
                model["merges"] = [m for m in model["merges"] if dropped.isdisjoint(_pair(m))]
        new = [dict(t) for t in add]
        gone = dropped | {t["content"] for t in new}
        kept = [t for t in self.added if t["content"] not in gone]
        data["added_tokens"] = sorted((*kept, *new), key=lambda t: t["id"])
        files = {"tokenizer.json": json.dumps(data, ensure_ascii=False) + "\n"}
        settings = self.folder / "tokenizer_config.json"
        if settings.is_file():
            said = read_json(settings)
            if isinstance(said.get("added_tokens_decoder"), dict):
                known = {k: t for k, t in said["added_tokens_decoder"].items() if t.get("content") not in dropped}
                known |= {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in new}
                files[settings.name] = json.dumps({**said, "added_tokens_decoder": known}, indent=2) + "\n"
        return files


def added_token(content: str) -> dict[str, Any]:
    """The entry of a token that is added as text, without an id."""
    return {"content": content, **_ADDED}


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
    if not any((folder / name).exists() for name in VOCABULARY_FILES):
        return None
    data = _contents(folder)
    ids, added = _ids(data, folder), list(data.get("added_tokens") or ())
    settings = folder / "tokenizer_config.json"
    said = read_json(settings).get("added_tokens_decoder") if settings.is_file() else None
    for number, token in said.items() if isinstance(said, dict) else ():
        # Of files that were edited by hand; transformers adds what is missing.
        content = token.get("content") if isinstance(token, dict) else None
        if isinstance(content, str) and content not in ids and number.isdecimal():
            ids[content] = int(number)
            added.append({"id": int(number), **_ADDED, **token})
    if not set(map(type, ids.values())) <= {int} or min(ids.values(), default=0) < 0:
        token, i = next((t, i) for t, i in ids.items() if type(i) is not int or i < 0)
        raise CheckpointError(f"{folder}: token {token!r} has id {i!r}; expected a whole number of at least 0")
    return Tokenizer(folder, ids, added, data if keep else None)


def _contents(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    return read_json(file) if file.is_file() else _converted(folder)


@functools.lru_cache(4)
def _converted(folder: Path) -> dict[str, Any]:
    """``tokenizer.json`` as transformers writes it for a tokenizer that is stored in another way."""
    try:
        with tempfile.TemporaryDirectory() as made:
            auto = import_module("transformers").AutoTokenizer
            auto.from_pretrained(folder, local_files_only=True).save_pretrained(made)
            return read_json(Path(made) / "tokenizer.json")
    except Exception as e:
        said = str(e).strip().partition("\n")[0][:200] or type(e).__name__
        raise CheckpointError(
            f"{folder}: transformers cannot read its tokenizer ({said}); save it there as tokenizer.json"
        ) from e
