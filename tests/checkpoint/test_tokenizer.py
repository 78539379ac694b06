"""seme/checkpoint/tokenizer.py: which token has which id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seme.checkpoint.tokenizer import first_difference, vocabulary
from seme.errors import CheckpointError


def folder(path: Path, vocab: Any, added: Any = (), file: str = "tokenizer.json") -> Path:
    path.mkdir()
    whole = {"model": {"vocab": vocab}, "added_tokens": added} if file == "tokenizer.json" else vocab
    (path / file).write_text(json.dumps(whole))
    return path


def test_vocabularies(tmp_path: Path) -> None:
    added = [{"content": "<s>", "id": 2, "special": True}]
    bpe = folder(tmp_path / "bpe", {"a": 0, "b": 1}, added)
    unigram = folder(tmp_path / "unigram", [["a", -1.5], ["b", -2.0]], added)
    slow = folder(tmp_path / "slow", {"a": 0, "b": 1, "<s>": 2}, file="vocab.json")
    for path in (bpe, unigram, slow):
        assert vocabulary(path) == {"a": 0, "b": 1, "<s>": 2}
    assert vocabulary(folder(tmp_path / "none", {"a": 0}, None)) == {"a": 0}
    assert vocabulary(tmp_path) is None


def test_differences(tmp_path: Path) -> None:
    ours = folder(tmp_path / "ours", {"a": 0, "b": 1})
    assert first_difference(ours, folder(tmp_path / "same", {"b": 1, "a": 0})) is None
    assert first_difference(ours, tmp_path) is None
    assert first_difference(tmp_path, ours) is None
    swapped = folder(tmp_path / "swapped", {"a": 1, "b": 0})
    assert first_difference(ours, swapped) == "token 'a' has id 0 there and 1 here"
    assert first_difference(ours, folder(tmp_path / "fewer", {"a": 0})) == "token 'b' has id 1 there and none here"
    more = folder(tmp_path / "more", {"a": 0, "b": 1, "c": 2, "d": 3})
    assert first_difference(ours, more) == "2 more tokens here"


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": None},
        {"model": {}},
        {"model": {"vocab": 5}},
        {"model": {"vocab": [1]}},
        {"model": {"vocab": [[]]}},
        {"model": {"vocab": [[["a"], 1]]}},
        {"model": {"vocab": {}}, "added_tokens": 5},
        {"model": {"vocab": {}}, "added_tokens": [{"id": 1}]},
        {"model": {"vocab": {}}, "added_tokens": ["x"]},
        {"model": {"vocab": {}}, "added_tokens": [{"content": [], "id": 1}]},
    ],
)
def test_what_is_no_tokenizer(content: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: no vocabulary that can be read in it$"):
        vocabulary(tmp_path)
