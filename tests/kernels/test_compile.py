"""Every Triton kernel compiles for GPUs, without a GPU, and to arithmetic that rounds each operation.

What the interpreter accepts, the compiler need not; and an fma, an approximate division or subnormal numbers that
become zero would show only in the bits of a result on a GPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__", "numeric", "tables"}
CAPABILITIES = ("80", "90")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What compile_kernels.py found, a list with one entry per kernel, compute dtype and GPU."""

    def start(capability):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        # A cache of its own: nothing that an earlier run compiled is taken for what compiles now.
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        script = Path(__file__).with_name("compile_kernels.py")
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, str(script), capability], env=environment, stdout=pipe, stderr=pipe)

    found = []
    for process in [start(capability) for capability in CAPABILITIES]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()
        found += json.loads(out)["kernels"]
    return found


def test_all_kernels_are_compiled(compiled):
    for capability in CAPABILITIES:
        chosen = [k for k in compiled if k["capability"] == int(capability)]
        assert {k["kernel"] for k in chosen} == KERNELS
        for k in chosen:
            assert k["elf"], k
            assert k["target"].startswith(f"sm_{capability}"), k


def test_every_operation_is_rounded_on_its_own(compiled):
    for k in compiled:
        for instruction in k["float_instructions"]:
            parts = instruction.split(".")
            assert parts[0] not in ("fma", "mad"), k
            assert "ftz" not in parts, k
            if parts[0] in ("add", "sub", "mul", "div", "cvt"):
                # Without .rn the assembler may fuse; .approx and .full are not correctly rounded.
                widening = parts[0] == "cvt" and "rn" not in parts
                assert widening or parts[1] == "rn", (instruction, k)


def test_division_is_there(compiled):
    """So that the test above has something to look at."""
    for k in compiled:
        if k["kernel"] in ("weighted_sum", "task_vector_sum") or k["constants"].get("NORMALIZE"):
            assert any(i.startswith("div.rn.f") for i in k["float_instructions"]), k
