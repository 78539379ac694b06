"""seme/checkpoint/tokenizer.py: which token has which id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seme.checkpoint.tokenizer import read, vocabulary
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


class TestChanged:
    def written(self, path: Path, drop: Any = (), add: Any = ()) -> dict[str, Any]:
        found = read(path)
        assert found is not None
        return {name: json.loads(text) for name, text in found.changed(drop, add).items()}

    def test_tokens_go_with_their_merges(self, tmp_path: Path) -> None:
        bpe = folder(tmp_path / "bpe", {"a": 0, "b": 1, "ab": 2, "c": 3}, [{"content": "c", "id": 3}])
        data = json.loads((bpe / "tokenizer.json").read_text())
        for merges in (["a b", "ab c"], [["a", "b"], ["ab", "c"]]):
            data["model"]["merges"] = merges
            (bpe / "tokenizer.json").write_text(json.dumps(data))
            found = self.written(bpe, {"c"})["tokenizer.json"]
            assert found["model"] == {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": merges[:1]}
            assert found["added_tokens"] == []

    def test_tokens_are_added_once_in_the_order_of_their_ids(self, tmp_path: Path) -> None:
        path = folder(tmp_path / "x", {"a": 0}, [{"content": "<s>", "id": 1, "special": True}])
        settings = {"tokenizer_class": "X", "added_tokens_decoder": {"1": {"content": "<s>", "special": True}}}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        found = self.written(path, (), [{"content": "b", "id": 2}, {"content": "a", "id": 0, "special": True}])
        added = found["tokenizer.json"]["added_tokens"]
        assert [(t["id"], t["content"]) for t in added] == [(0, "a"), (1, "<s>"), (2, "b")]
        assert found["tokenizer.json"]["model"]["vocab"] == {"a": 0}
        assert set(found["tokenizer_config.json"]["added_tokens_decoder"]) == {"0", "1", "2"}
        assert found["tokenizer_config.json"]["tokenizer_class"] == "X"

    def test_a_list_of_pieces_loses_none(self, tmp_path: Path) -> None:
        unigram = folder(tmp_path / "unigram", [["a", -1.5], ["b", -2.0]])
        with pytest.raises(CheckpointError, match=r"unigram: its tokenizer has tokens without a row .* such as 'b'"):
            self.written(unigram, {"b"})


class TestRead:
    def test_tokens_that_only_the_settings_have_are_added(self, tmp_path: Path) -> None:
        path = folder(tmp_path / "x", {"a": 0})
        decoder = {"1": {"content": "<s>", "special": True}, "0": {"content": "a"}}
        (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
        found = read(path)
        assert found is not None
        assert found.ids == {"a": 0, "<s>": 1}
        assert [(t["id"], t["special"]) for t in found.added] == [(1, True)]

    def test_none_and_what_transformers_cannot_read(self, tmp_path: Path) -> None:
        assert read(tmp_path) is None
        (tmp_path / "tokenizer.model").write_bytes(b"x")
        with pytest.raises(CheckpointError, match=r"transformers cannot read its tokenizer .*; save it there as"):
            read(tmp_path)

    def test_an_older_tokenizer_is_converted(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
        found = read(tmp_path)
        assert found is not None
        assert (found.ids["a"], found.ids["##b"], len(found.ids)) == (5, 6, 7)

    @pytest.mark.parametrize("number", [-1, "1", None, True])
    def test_ids_are_whole_numbers(self, number: Any, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"token 'a' has id .*; expected a whole number of at least 0"):
            read(folder(tmp_path / "x", {"a": number}))


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
