"""The tokenizer's files: which they are, and whether two models number their tokens alike."""

from __future__ import annotations

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


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token to id from ``tokenizer.json`` (added tokens included) or ``vocab.json``; None without either."""
    if (folder / "tokenizer.json").is_file():
        data = read_json(folder / "tokenizer.json")
        try:
            vocab: Any = data["model"]["vocab"]
            if isinstance(vocab, list):  # unigram: [[token, score], ...] in the order of ids
                vocab = {entry[0]: i for i, entry in enumerate(vocab)}
            return {**vocab, **{token["content"]: token["id"] for token in data.get("added_tokens") or ()}}
        except (LookupError, TypeError) as e:
            raise CheckpointError(f"{folder / 'tokenizer.json'}: no vocabulary that can be read in it") from e
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    return None


def first_difference(ours: Path, theirs: Path) -> str | None:
    """The first token that two models number differently, in words; None if there is none or nothing to compare."""
    a, b = vocabulary(ours), vocabulary(theirs)
    if a is None or b is None or a == b:
        return None
    for token, number in a.items():
        if b.get(token) != number:
            return f"token {token!r} has id {number} there and {b.get(token, 'none')} here"
    return f"{len(b) - len(a)} more tokens here"
