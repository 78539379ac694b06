"""seme/env.py: the report says what is true, and never fails for what it finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import seme
from seme import native
from seme.env import INSTRUCTION_SETS, as_text, collect
from seme.ops._op import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
BY_NAME = [name for name in BACKENDS if name != "auto"]


def child(*arguments: str, **variables: str) -> str:
    """Standard output of a new Python in the repository root."""
    env = {**os.environ, **variables}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_report_survives_json_and_covers_every_backend():
    found = collect()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["seme"] == seme.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["location"] == str(Path(seme.__file__).parent)
    for device in found["devices"].values():
        assert list(device["backends"]) == BY_NAME
        assert device["memory"] > 2**20
    assert len([name for name in found["devices"] if name != "cpu"]) == torch.cuda.device_count()


def test_text_holds_every_fact():
    found = collect()
    text = as_text(found)
    facts = [*found["versions"], *(v for v in found["versions"].values() if v), *found["devices"], *BY_NAME]
    reasons = [*found["compiled"].values(), found["no_cuda"]]
    reasons += [r for device in found["devices"].values() for r in device["backends"].values()]
    for fact in facts + [r for r in reasons if r is not None]:
        assert fact in text


def test_command_line_prints_the_same_report():
    found = json.loads(child("-m", "seme", "env", "--json"))
    assert found["versions"] == collect()["versions"]
    assert "seme " in child("-m", "seme", "env").splitlines()[0]


@pytest.mark.skipif(native.why_not("_C") is not None, reason="seme._C is not built")
def test_instruction_set_is_the_one_in_use():
    module = native.module()
    try:
        for number in range(module.best_isa() + 1):
            module.set_isa(number)
            assert collect()["instruction_set"] == INSTRUCTION_SETS[number]
    finally:
        module.set_isa(module.best_isa())


def test_missing_module_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.delenv("SEME_BACKEND", raising=False)
    monkeypatch.setitem(native._loaded, "_C", "No module named 'seme._C'")
    found = collect()
    assert "SEME_NATIVE=1" in found["compiled"]["_C"]
    assert found["instruction_set"] is None
    assert found["devices"]["cpu"]["backends"]["cpu"] is not None
    assert found["devices"]["cpu"]["auto"] == "torch"
    assert "torch          works (the default here)" in as_text(found)


def test_triton_on_the_cpu_depends_on_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = collect()
    assert found["devices"]["cpu"]["backends"]["triton"] is None
    assert found["settings"]["TRITON_INTERPRET"] == "1"
    monkeypatch.delenv("TRITON_INTERPRET")
    found = collect()
    assert "TRITON_INTERPRET=1" in found["devices"]["cpu"]["backends"]["triton"]
    assert "TRITON_INTERPRET" not in found["settings"]


def test_backend_that_does_not_work_is_no_default(monkeypatch):
    monkeypatch.setenv("SEME_BACKEND", "tritn")
    found = collect()
    assert found["devices"]["cpu"]["auto"] is None
    assert "the default here" not in as_text(found)
    assert found["settings"]["SEME_BACKEND"] == "tritn"


@pytest.mark.parametrize("fault", ["ImportError('libcudart.so.13 not found')", "OSError('broken\\nlibrary')"])
def test_torch_that_does_not_import_is_reported(tmp_path, fault):
    (tmp_path / "torch.py").write_text(f"raise {fault}\n")
    found = json.loads(child("-m", "seme", "env", "--json", PYTHONPATH=str(tmp_path)))
    assert found["no_cuda"].startswith("torch does not import: ")
    assert "\n" not in found["no_cuda"]
    backends = found["devices"]["cpu"]["backends"]
    assert backends["torch"] == backends["triton"] == found["no_cuda"]


def test_cuda_devices_are_listed(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150 * 10**9)
    monkeypatch.delenv("SEME_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    found = collect()
    assert list(found["devices"]) == ["cpu", "cuda:0", "cuda:1"]
    assert found["no_cuda"] is None
    assert found["devices"]["cuda:1"]["name"] == "NVIDIA H200 (sm_90)"
    assert found["devices"]["cuda:1"]["backends"]["cpu"] is not None
    assert found["devices"]["cuda:1"]["backends"]["torch"] is None
    assert "cuda:1: NVIDIA H200 (sm_90), 150.0 GB" in as_text(found)


def test_importing_the_report_imports_no_torch():
    assert child("-c", "import seme.env, sys; print('torch' in sys.modules)").strip() == "False"
