"""The corpus of the fuzzer, and a short run of it. In a process of its own, whose memory is limited."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .fuzz import CORPUS, TARGETS

ROOT = Path(__file__).parents[2]


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "tests.hostile.fuzz", *arguments]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_breaks_a_property(target: str, tmp_path: Path) -> None:
    inputs = 1000 if target == "recipe" else 2500
    out = tmp_path / "out.json"
    done = fuzz("--targets", target, "--inputs", str(inputs), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["targets"][target]
    assert found["inputs"] == inputs
    assert 0 < found["accepted"] < inputs + 200 * len(list((CORPUS / target).iterdir()))


def test_the_corpus_is_small() -> None:
    assert sum(file.stat().st_size for file in CORPUS.rglob("*") if file.is_file()) < 200_000


def test_inputs_are_the_same_ones_again() -> None:
    from .fuzz import Mutator, inputs, seeds

    mutator = Mutator(list(seeds("adapter").values()), "json")
    found = dict(inputs("adapter", 3, 0, 600, mutator))
    assert len(set(found.values())) > 300
    assert dict(inputs("adapter", 3, 500, 100, mutator)) == {k: found[k] for k in list(found)[500:]}
