"""The labels of a vocabulary: their text for people, their bytes for comparing vocabularies of different tokenizers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from seme.checkpoint.tokenizer import VOCABULARY_FILES, vocabulary
from seme.errors import SemeError


def decoded(folder: Path | None, size: int) -> list[str]:
    """The text of labels 0 to ``size`` - 1; ``<5>`` where the tokenizer has none, or where there is no tokenizer.

    Taken from ``tokenizer.json`` by the tokenizers library, else from whatever transformers finds in the folder.
    Without the library, from the vocabulary as it is stored (``Ġthe`` for ``the`` after a space).

    Raises:
        CheckpointError: the tokenizer's files cannot be read.
    """
    unknown = [f"<{i}>" for i in range(size)]
    if folder is None:
        return unknown
    tokenizer = _tokenizer(folder)
    if tokenizer is not None:
        known = min(size, len(tokenizer) if hasattr(tokenizer, "__len__") else tokenizer.get_vocab_size())
        return [_decode(tokenizer, i) or unknown[i] for i in range(known)] + unknown[known:]
    for token, i in _numbered(vocabulary(folder) or {}, size).items():
        unknown[i] = token
    return unknown


def _numbered(tokens: Mapping[str, Any], size: int) -> dict[str, int]:
    """The tokens whose ids are labels; a file may have any JSON for one."""
    return {t: i for t, i in tokens.items() if isinstance(t, str) and type(i) is int and 0 <= i < size}


def _tokenizer(folder: Path) -> Any:
    try:
        if (folder / "tokenizer.json").is_file():
            return import_module("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
        if not any((folder / name).is_file() for name in VOCABULARY_FILES):
            return None  # known without importing the library, which takes seconds
        return import_module("transformers").AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # not installed, or files it does not understand; there may be none at all
        return None


def _decode(tokenizer: Any, label: int) -> str:
    """One label. Tokens that are a part of a character decode to U+FFFD; these are shown as they are stored."""
    text = str(tokenizer.decode([label], skip_special_tokens=False))
    if "\ufffd" not in text:
        return text
    find = getattr(tokenizer, "id_to_token", None) or tokenizer.convert_ids_to_tokens
    return str(find(label))


def shared(source: Path | None, target: Path | None, sizes: tuple[int, int]) -> list[tuple[int, int]]:
    """Index pairs (source, target) of the labels that stand for the same bytes in two vocabularies, by source index.

    Byte-level tokens (``Ġthe``) and SentencePiece tokens (``▁the``) are compared by the bytes they stand for, special
    tokens by their name.

    Raises:
        SemeError: a folder has no tokenizer that can be read without its library.
    """
    ours, theirs = (_by_bytes(folder, size) for folder, size in zip((source, target), sizes))
    return sorted((i, theirs[key]) for key, i in ours.items() if key in theirs)


def by_name(folder: Path | None, size: int) -> dict[str, int]:
    """Token, as it is stored, to label.

    Raises:
        SemeError: there is neither ``tokenizer.json`` nor ``vocab.json``.
    """
    found = None if folder is None else vocabulary(folder)
    if found is None:
        where = "a head without a folder" if folder is None else str(folder)
        raise SemeError(f"{where}: no tokenizer.json or vocab.json; give the shared labels as pairs of indices")
    return _numbered(found, size)


def _by_bytes(folder: Path | None, size: int) -> dict[bytes, int]:
    tokens = by_name(folder, size)
    starts = [sum(token.startswith(mark) for token in tokens) for mark in ("Ġ", "▁")]
    decode = _byte_level if starts[0] > starts[1] else _sentence_piece
    found: dict[bytes, int] = {}
    # Of two tokens of the same bytes the one that is text comes first, the fallback for a single byte second.
    for token, i in sorted(tokens.items(), key=lambda entry: (_BYTE.fullmatch(entry[0]) is not None, entry[1])):
        found.setdefault(decode(token), i)
    return found


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _sentence_piece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_CODES[c] for c in token)
    except KeyError:  # an added token, stored as it is
        return token.encode()


def _codes() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable bytes stand for themselves, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


_CODES = _codes()
