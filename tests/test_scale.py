"""Merges of many tensors, of many bytes, and of several at once; ``benchmarks/scale.py`` has the seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pytest

import seme
from benchmarks.checkpoints import SIZES, Llama, store
from benchmarks.scale import moe, moe_config
from seme import plan as planning
from seme.checkpoint import descriptors
from seme.config import load
from seme.engine import TENSOR_MEMORY, Options, peak_memory
from seme.merging import ready

from .checkpoints import decoder, write

ROOT = Path(__file__).resolve().parents[1]


def experts(folder: Path, tensors: int) -> list[Path]:
    """Three mixtures of experts with 50 tensors in a file, of zeros."""
    models = [folder / f"{tensors}-{i}" for i in range(3)]
    for model in models:
        store(model, moe_config(tensors), moe(tensors), tensors // 50, None)
    return models


def shard(tensors: int) -> int:
    """Bytes of an output file that holds about 50 of them."""
    return 2 * sum(map(prod, moe(tensors).values())) // (tensors // 50)


def recipe(method: str, models: list[Path]) -> dict[str, Any]:
    given = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models[1:]]
    return {"merge_method": method, "models": given, **({"base_model": str(models[0])} if method == "ties" else {})}


@contextmanager
def calls() -> Iterator[Counter[str]]:
    """Calls by name, of this thread and those that are started meanwhile."""
    found: Counter[str] = Counter()

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            found["functions of Python"] += 1
        elif event == "c_call":
            found["functions of C"] += 1
            if getattr(argument, "__module__", None) in ("posix", "io", "_io"):
                found[argument.__name__] += 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_work_grows_with_the_number_of_tensors(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Functions called and files opened, asked about, read, written and synced, by a whole merge; with fewer files open
    than there are."""
    monkeypatch.setattr(descriptors, "MOST", 8)
    counts = []
    for tensors in (300, 1500):
        given = recipe(method, experts(tmp_path, tensors))
        seme.merge(given, tmp_path / f"warm-{tensors}", threads=1, out_shard_size=shard(tensors))
        with calls() as found:
            seme.merge(given, tmp_path / f"out-{tensors}", threads=1, out_shard_size=shard(tensors))
        counts.append(found)
        assert found["preadv"] >= 2 * tensors
    few, many = counts
    assert {"open", "preadv", "pwrite", "fsync", "stat", "functions of Python", "functions of C"} <= few.keys()
    # Five times as many tensors, and files. Which worker waits for which is not the same each time.
    assert {name: n for name, n in many.items() if n > 5.5 * few[name] + 50} == {}


def test_the_memory_of_a_plan_grows_with_the_number_of_tensors(tmp_path: Path) -> None:
    """And of models, by no more than the dry run counts for each."""
    peaks = []
    for tensors in (500, 2500):
        config = load(recipe("ties", experts(tmp_path, tensors)))
        tracemalloc.start()
        planning.make(config, max_shard=shard(tensors)).close()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2000 * 3 * TENSOR_MEMORY


@pytest.mark.parametrize("method", ["linear", "ties", "seme"])
def test_a_plan_of_70_billion_parameters(method: str, tmp_path: Path) -> None:
    llama = SIZES["70b"]
    models = [tmp_path / f"model-{i}" for i in range(3)]
    for model in models:
        store(model, llama.config(), llama.tensors(), 30, None)
    given = recipe(method, models)
    if method == "seme":
        given = {
            "merge_method": "seme",
            "base_model": str(models[0]),
            "models": [{"model": str(m)} for m in models[1:]],
        }
    plan = planning.make(load(given))
    try:
        assert plan.layout.total_size == 2 * llama.parameters == 141_107_412_992
        assert plan.layout.slots.keys() == llama.tensors().keys() == {t.name for t in plan.tensors}
        assert {t.name: t.spec.shape for t in plan.tensors} == llama.tensors()
        places: dict[int, list[tuple[int, int]]] = {}
        for t in plan.tensors:
            slot = plan.layout.slots[t.name]
            places.setdefault(slot.shard, []).append((slot.offset, slot.offset + 2 * t.spec.numel))
        for i, (header, size) in enumerate(zip(plan.layout.headers, plan.layout.sizes)):
            starts, stops = zip(*sorted(places[i]))
            assert (*starts, size) == (len(header), *stops)
            assert size <= len(header) + 5 * 10**9
        if method != "seme":
            options = Options(threads=2)
            assert peak_memory(plan, options, ready(plan, options, "cpu", "cpu")) < 1 << 30
    finally:
        plan.close()


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_memory_does_not_grow_with_the_tensors(method: str, tmp_path: Path) -> None:
    """Those of the models, which are one tensor each, are read whole; what is made of them is dropped."""
    llama = Llama(vocabulary=64 << 10, hidden=2048, layers=0, intermediate=1, heads=1, kv_heads=1)
    models = [tmp_path / f"model-{i}" for i in range(3)]
    for model in models:
        store(model, llama.config(), llama.tensors(), 1, None)
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe(method, models)))
    spec = {"recipe": str(tmp_path / "recipe.yml"), "out": str(tmp_path / "out"), "threads": 1, "shard": 10**9}
    spec |= {"discard": True, "noise": None, "files": 64}
    command = [sys.executable, "-m", "benchmarks.merger", json.dumps(spec)]
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert found["bytes_written"] == 2 * llama.parameters == 256 << 20
    assert found["peak_anonymous_bytes"] < 64 << 20
    assert (tmp_path / "out" / "model.safetensors").stat().st_blocks * 512 < 1 << 20


HELD = """
import sys
from seme import cli, merging
run = merging.Engine.run
def held(*arguments):
    print("merging", flush=True)
    sys.stdin.readline()
    return run(*arguments)
merging.Engine.run = held
sys.exit(cli.main(["merge", *sys.argv[1:], "--quiet", "--threads", "1", "--out-shard-size", "2KB"]))
"""


class Held:
    """``seme merge`` as a process that waits for a word, when the target is its own and nothing is merged yet."""

    def __init__(self, *arguments: str) -> None:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", HELD, *arguments]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def wait(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "merging\n"

    def finish(self) -> tuple[int, str]:
        """Its exit code, and what it had to say."""
        _, err = self.process.communicate("go on\n", timeout=120)
        return self.process.returncode, err


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Recipes, and what each gives alone, in the folders alone-0 and alone-1."""
    models = [write(tmp_path / f"model-{i}", decoder(i, layers=8), layout="shards") for i in range(3)]
    recipes = []
    for i, method in enumerate(("linear", "ties")):
        recipes.append(str(tmp_path / f"{method}.yml"))
        Path(recipes[i]).write_text(json.dumps(recipe(method, models)))
        seme.merge(recipes[i], tmp_path / f"alone-{i}", out_shard_size="2KB")
    return recipes


def weights(folder: Path) -> dict[str, bytes]:
    found = {file.name: file.read_bytes() for file in folder.glob("model*")}
    assert len(found) > 3
    return found


def test_two_merges_at_once_do_not_disturb_each_other(two: list[str], tmp_path: Path) -> None:
    merges = [Held(file, str(tmp_path / f"out-{i}")) for i, file in enumerate(two)]
    for merge in merges:
        merge.wait()
    for merge in merges:
        assert merge.process.stdin is not None
        merge.process.stdin.write("go on\n")
        merge.process.stdin.flush()
    assert [merge.finish() for merge in merges] == [(0, ""), (0, "")]
    for i in range(2):
        assert weights(tmp_path / f"out-{i}") == weights(tmp_path / f"alone-{i}")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("option", [[], ["--overwrite"], ["--resume"]])
def test_a_second_merge_to_the_same_target_is_refused(option: list[str], two: list[str], tmp_path: Path) -> None:
    """Whatever it is told to do with what it finds; the first one goes on as if there were no other."""
    out = str(tmp_path / "out")
    first = Held(two[0], out)
    first.wait()
    second = Held(two[1], out, *option)
    message = f"{out}: another merge is writing to it; wait for it or choose another folder"
    assert second.finish() == (2, f"seme: error: {message}\n")
    assert first.finish() == (0, "")
    assert weights(tmp_path / "out") == weights(tmp_path / "alone-0")
    assert not list(tmp_path.glob(".*"))
