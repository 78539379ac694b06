"""The GPU benchmark without a GPU: every op is in it, its parts run on the CPU, and its runner keeps its word."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoints
from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import device, matrix, measure, merge
from seme.ops._registry import MATRIX_OPS, OPS

from .device import GPU

pytestmark = [
    pytest.mark.skipif(GPU, reason="the benchmark itself runs here: benchmarks/gpu/run.sh"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy's, in the interpreter
]


def test_no_op_is_missing():
    measured = {name.split()[0] for name in measure.all_cases(0)}
    assert set(OPS) <= measured
    models = measure.make_tensors(64, "cpu")
    found = matrix.cases([t.view(8, 8) for t in models], labels=40)
    assert set(MATRIX_OPS) <= {case.op for case in found.values()}
    assert set(matrix.GOALS) <= {case.op for case in found.values()}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results.json"


def entries(out):
    return json.loads(out.read_text())["entries"]


def test_element_wise_ops(out, capsys):
    measure.main(["--smoke", "--out", str(out), "--cases", "weighted_sum 2", "nonfinite", "TIES"])
    found = entries(out)
    assert found.keys() == {"ops/weighted_sum 2", "ops/nonfinite 1", "ops/TIES 1+3, exact threshold"}
    for entry in found.values():
        assert entry["checked"] == {"triton": 0, "cpu": 0}
        assert entry["seconds"].keys() == {"copy", "triton", "cpu", "torch"}
    # Each input once and the output once; for the exact threshold the inputs twice.
    assert found["ops/weighted_sum 2"]["bytes"] == 3 * 2 * measure.SMOKE
    assert found["ops/TIES 1+3, exact threshold"]["bytes"] == 9 * 2 * measure.SMOKE
    assert "0.85" in capsys.readouterr().out


def test_matrix_ops(out, capsys):
    matrix.main(["--smoke", "--out", str(out), "--cases", "delta_gram", "selection, 32 labels, bf", "bases", "elect 1"])
    found = entries(out)
    assert len(found) == 3 + 1
    for name, entry in found.items():
        assert not entry.get("failed"), name
        assert max(entry["checked"].values()) < 1e-2
    assert "bases of 80 x 32" in capsys.readouterr().out


def test_whole_merges(out, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoints, "POOL", 4099)
    merge.main(["--smoke", "--out", str(out), "--dir", str(tmp_path), "--cases", "linear, page cache"])
    (entry,) = entries(out).values()
    assert entry["seconds"].keys() == {"floor", "cpu triton", "cpu cpu"}
    assert entry["over_floor"].keys() == {"cpu triton", "cpu cpu"}
    assert entry["equal_values"] == {"to": "cpu triton", "cpu triton": 1.0, "cpu cpu": 1.0}
    assert entry["output_bytes"] * 2 <= entry["input_bytes"]
    assert list(tmp_path.iterdir()) == [out]
    assert "linear, page cache, 2 layers" in capsys.readouterr().out


def test_the_model_fits_disk_memory_and_time():
    fast, slow = ({"write_mb_s": n, "read_mb_s": n} for n in (4000, 400))
    plenty = 1 << 40

    def layers(disk, memory, seconds, speed):
        return next(n for n in merge.LAYERS if merge.fits(n, disk, memory, seconds, speed))

    assert layers(plenty, plenty, 1e6, fast) == 32
    assert layers(60 << 30, plenty, 1e6, fast) == 32  # two models and an output of 16 GB each, and the small ones
    assert layers(48 << 30, plenty, 1e6, fast) == 24
    assert layers(plenty, 30 << 30, 1e6, fast) < 24
    assert layers(plenty, plenty, 300, slow) < layers(plenty, plenty, 300, fast)
    assert abs(merge.LLAMA.parameters - 8.03e9) < 1e7


def test_what_fails_costs_no_other_number(out, capsys, monkeypatch):
    good = measure.verify

    def verify(case, tensors, backend):
        if case.inputs == 3:
            raise RuntimeError("illegal address")
        return 5 if backend == "triton" else good(case, tensors, backend)

    monkeypatch.setattr(measure, "verify", verify)
    with pytest.raises(SystemExit, match="illegal address"):
        measure.main(["--smoke", "--out", str(out), "--cases", "weighted_sum"])
    three, two = (entries(out)[f"ops/weighted_sum {n}"] for n in (3, 2))
    assert three["failed"].keys() == {"triton", "cpu"}
    assert three["of_copy"] == {}
    assert two["failed"] == {"triton": "5 results differ from the reference"}
    assert two["of_copy"].keys() == {"cpu"}  # no number without a right result
    capsys.readouterr()


def test_a_part_goes_on_behind_what_took_its_gpu(out, tmp_path, capsys, monkeypatch):
    """An entry of the same run is not measured again; the process ends so that a new one has the GPU again."""
    run = tmp_path / "run.json"
    run.write_text(json.dumps(device.run_of(device.Device("cpu"))))
    arguments = ["--smoke", "--out", str(out), "--run", str(run), "--cases", "weighted_sum"]
    monkeypatch.setattr(device.Device, "broken", lambda self: True)
    with pytest.raises(SystemExit) as ended:
        measure.main(arguments)
    assert ended.value.code == device.RESTART
    assert entries(out).keys() == {"ops/weighted_sum 3"}
    monkeypatch.undo()
    monkeypatch.setattr(measure, "verify", lambda case, *_: 0 if case.inputs == 2 else 1)
    measure.main(arguments)
    assert entries(out).keys() == {"ops/weighted_sum 3", "ops/weighted_sum 2"}
    assert "failed" not in entries(out)["ops/weighted_sum 3"]
    capsys.readouterr()


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """The runner with parts that do something else."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(runner, "GRACE", 0.2)

    def run(**replaced):
        monkeypatch.setattr(runner, "PARTS", replaced)
        monkeypatch.setattr(runner, "SECONDS", dict.fromkeys(replaced, 2.0))
        monkeypatch.setattr(runner, "SMOKE_SECONDS", 2.0)
        with pytest.raises(SystemExit) as ended:
            runner.main(["--smoke", "--work", str(tmp_path / "work")])
        (file,) = (tmp_path / "out").glob("gpu-*.json")
        return ended.value.code, entries(file)

    return run


def program(text):
    """A part that is one Python program."""
    return lambda running: {"codes": running.call([sys.executable, "-c", text])}


def test_the_runner_ends_a_part_and_goes_on(parts, tmp_path, capsys):
    pid = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(600)"
    hangs = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    code, found = parts(build=program("print(1)"), test=program(hangs), ops=program("print(3)"))
    assert code == 1
    assert found["test"]["error"] == "ended: its time was up"
    assert found["test"]["took"] < 10
    assert found["ops"]["codes"] == [0]  # the others are there
    assert "its time was up" in capsys.readouterr().out
    status = Path("/proc", pid.read_text(), "status")  # what the part had started is gone as well
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_the_runner_says_what_failed(parts, capsys):
    def fails(running):
        running.call([sys.executable, "-c", "print('the reason')"])
        raise runner.Failed("exit code 7")

    code, found = parts(build=fails, ops=program("pass"))
    assert code == 1
    assert found["build"]["error"] == "exit code 7"
    assert "the reason" in found["build"]["log"]
    assert "error" not in found["ops"]
    capsys.readouterr()


def test_time_that_a_part_leaves_is_not_lost(parts, capsys):
    """Two seconds for each: the second may take what the first did not."""
    code, found = parts(build=program("pass"), ops=program("import time; time.sleep(2.5)"))
    assert (code, found["ops"]["codes"]) == (0, [0])
    assert found["ops"]["limit"] >= 3
    capsys.readouterr()


def test_provenance(monkeypatch):
    monkeypatch.setenv("SEME_COMMIT", "abc123")
    run = device.run_of(device.Device("cpu"))
    assert run["commit"] == "abc123"
    assert run["versions"]["torch"] == torch.__version__
    run["machine"]["gpu"] = {"name": "NVIDIA H100 80GB HBM3"}
    assert device.place(run).name == "gpu-h100-80gb-hbm3.json"


def test_all_parts_end_within_nine_minutes():
    assert sum(runner.SECONDS.values()) <= 9 * 60 - 20  # looking for the GPU, and the tables
    assert list(runner.SECONDS) == list(runner.PARTS)
