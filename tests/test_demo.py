"""The demo, with models too small to be good, from text to table."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seme import cli, demo
from seme.errors import SemeError, TargetError

SIZES = demo.Sizes(
    vocabulary=384,
    hidden=64,
    layers=1,
    context=32,
    base_steps=60,
    expert_steps=40,
    train_chars=100_000,
    valid_chars=10_000,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"the demo asked the network: {args}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return demo.run(tmp_path_factory.mktemp("demo") / "out", sizes=SIZES, quiet=True, as_json=True)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}


def test_merged_model_is_better_over_all_domains_than_its_base_and_than_the_experts_on_average(
    done: dict[str, Any],
) -> None:
    mean = {name: row["mean"] for name, row in done["loss"].items()}
    assert list(mean) == ["base", "python-expert", "cpp-expert", "merged"]
    assert mean["merged"] < mean["base"] - 0.2  # seeds 0 to 7: 0.35 to 0.47 below
    assert mean["merged"] < (mean["python-expert"] + mean["cpp-expert"]) / 2  # seeds 0 to 7: 0.08 to 0.12 below


def test_expert_and_merged_model_are_better_than_the_base_in_each_expert_domain(done: dict[str, Any]) -> None:
    for domain, expert in (("Python", "python-expert"), ("C++", "cpp-expert")):
        loss = {name: row[domain] for name, row in done["loss"].items()}
        assert max(loss[expert], loss["merged"]) < loss["base"]


def test_inputs_are_sharded_bfloat16_and_the_result_is_the_formula(done: dict[str, Any]) -> None:
    base, python, cpp, merged = (weights(done["models"][name]) for name in demo.MODELS)
    for name in demo.MODELS[:3]:
        assert len(list(Path(done["models"][name]).glob("model-*-of-00002.safetensors"))) == 2
    assert set(merged) == set(base)
    for name, tensor in merged.items():
        b, one, two = (m[name].float() for m in (base, python, cpp))
        torch.testing.assert_close(tensor, (b + ((one - b) * 0.6 + (two - b) * 0.6)).bfloat16(), rtol=0, atol=0)


def test_result_is_plain_data_and_names_what_lies_there(done: dict[str, Any]) -> None:
    assert json.loads(json.dumps(done)) == done
    assert Path(done["recipe"]).is_file()
    for folder in done["models"].values():
        for file in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
            assert (Path(folder) / file).is_file(), f"{folder}/{file}"


def test_tokenizer_of_the_merged_model_encodes_any_text_and_has_a_chat_template(done: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(done["models"]["merged"])
    text = "naïve\tx = 1\r\n日本 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer("<|im_end|>")["input_ids"]) == 1


def test_the_command_shown_repeats_the_merge(done: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(done["folder"]).parent)
    file = Path(done["models"]["merged"]) / "model.safetensors"
    before = file.read_bytes()
    file.unlink()
    command = shlex.split(done["command"])
    arguments = command[command.index("merge") :]
    assert cli.main([*arguments, "--quiet"]) == 0
    assert file.read_bytes() == before


def test_the_command_shown_calls_this_seme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = tmp_path / "env" / "bin" / "seme", tmp_path / "other" / "seme"
    monkeypatch.setattr(sys, "executable", str(ours.with_name("python")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(other.parent))
    assert demo._program() == [sys.executable, "-m", "seme"]
    for script in (ours, other):
        script.parent.mkdir(parents=True)
        script.touch(mode=0o755)
    assert demo._program() == ["env/bin/seme"]
    monkeypatch.chdir(ours.parent)  # without a slash the shell would look along the path
    assert demo._program() == [str(ours)]
    monkeypatch.setenv("PATH", f"{ours.parent}:{other.parent}")
    assert demo._program() == ["seme"]


def test_same_seed_same_bytes_and_nothing_of_the_caller_changes(
    done: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    def state() -> tuple[Any, ...]:
        bars = logging.is_progress_bar_enabled()
        return torch.get_num_threads(), logging.get_verbosity(), bars, os.environ.get("HF_HUB_OFFLINE")

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.manual_seed(7)
        before, numbers = state(), torch.get_rng_state()
        again = demo.run(tmp_path / "räum &co", sizes=SIZES)
        assert state() == before
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), numbers)
    for name, folder in again["models"].items():
        ours, theirs = weights(folder), weights(done["models"][name])
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert again["loss"] == done["loss"]

    shown = capsys.readouterr()
    assert "training base: 60 steps on prose" in shown.err
    assert "merged" in shown.out
    assert f"{done['loss']['merged']['mean']:.3f}" in shown.out
    assert again["command"] in shown.out


def test_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(TargetError, match="not empty; name another folder or pass --overwrite"):
        demo.run(tmp_path, sizes=SIZES)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_target_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(TargetError, match="file: "):
            demo.run(tmp_path / "file", sizes=SIZES, overwrite=overwrite)


def test_without_transformers_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SemeError, match=r"transformers cannot be imported .*: pip install 'seme\[demo\]'$"):
        demo.run(tmp_path / "out", sizes=SIZES)


def paragraphs(texts: list[str]) -> set[str]:
    return {p for text in texts for p in text.split("\n\n") if len(p) > 80}


def test_what_is_measured_on_was_not_trained_on() -> None:
    sizes = demo.Sizes()
    for domain in demo.SOURCES:
        train, valid = demo._texts(domain, sizes, seed=0)
        assert not paragraphs(train) & paragraphs(valid)
        assert sum(map(len, valid)) >= sizes.valid_chars
        assert sum(map(len, train)) >= sizes.train_chars // 3


def test_the_next_place_is_searched_when_one_has_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))  # no standard library, no headers
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    for domain in demo.SOURCES:
        train, valid = demo._texts(domain, SIZES, seed=0)
        assert sum(map(len, train)) >= SIZES.train_chars // 4
        assert not paragraphs(train) & paragraphs(valid)


def test_too_little_text_is_an_error_that_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.SOURCES, "C++", (("one place", lambda: ["int x;"]), ("another", list)))
    with pytest.raises(SemeError, match=r"too little C\+\+ text in this Python: one place \(1 files\), another \(0 "):
        demo._texts("C++", SIZES, seed=0)
