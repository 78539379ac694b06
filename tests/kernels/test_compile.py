"""Every Triton kernel compiles for GPUs, without a GPU.

What the interpreter accepts, the compiler need not. The element-wise ones compile to arithmetic that rounds each
operation: an fma, an approximate division or subnormal numbers that become zero would show only in the bits of a
result on a GPU. Those with matrix products compile to instructions of the tensor cores, and fit into a multiprocessor.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HELPERS = {"__init__", "numeric", "tables", "tiles"}
MATRIX = {path.stem for path in (ROOT / "kernels").glob("*.py") if "from .tiles import" in path.read_text()}
KERNELS = {path.stem for path in (ROOT / "kernels").glob("*.py")} - HELPERS - MATRIX
CAPABILITIES = ("80", "90")
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that one program can have

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What compile_kernels.py found: two lists, with one entry per kernel, compute dtype or operand, and GPU."""

    def start(capability):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        # A cache of its own: nothing that an earlier run compiled is taken for what compiles now.
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        script = Path(__file__).with_name("compile_kernels.py")
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, str(script), capability], env=environment, stdout=pipe, stderr=pipe)

    found = {"kernels": [], "matrix": []}
    for process in [start(capability) for capability in CAPABILITIES]:
        out, err = process.communicate(timeout=1200)
        assert process.returncode == 0, err.decode()
        printed = json.loads(out)
        for kind in ("kernels", "matrix"):
            found[kind] += printed[kind]
        found["triton"] = printed["triton"]
    return found


@pytest.mark.parametrize(("kind", "names"), [("kernels", KERNELS), ("matrix", MATRIX)])
def test_all_kernels_are_compiled(compiled, kind, names):
    for capability in CAPABILITIES:
        chosen = [k for k in compiled[kind] if k["capability"] == int(capability)]
        assert {k["kernel"] for k in chosen} == names
        for k in chosen:
            assert k["elf"], k
            assert k["target"].startswith(f"sm_{capability}"), k


def test_every_operation_is_rounded_on_its_own(compiled):
    for k in compiled["kernels"]:
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
    for k in compiled["kernels"]:
        if k["kernel"] in ("weighted_sum", "task_vector_sum") or k["constants"].get("NORMALIZE"):
            assert any(i.startswith("div.rn.f") for i in k["float_instructions"]), k


def test_products_run_on_the_tensor_cores(compiled):
    """In the operand's own type; float32 alone keeps to the other units, because the tensor cores would round it."""
    float64_dot = tuple(map(int, compiled["triton"].split(".")[:2])) >= (3, 5)
    types = {"bfloat16": "bf16", "tf32": "tf32", "tf32x3": "tf32", "float64": "f64"}
    for k in compiled["matrix"]:
        if "BLOCK_K" not in k["constants"]:
            continue  # a sum beside the products
        if k["compute"] == "float32" or (k["compute"] == "float64" and not float64_dot):
            assert not k["products"], k
        elif k["compute"] == "float64" and k["constants"].get("BLOCK_M", 16) < 16:
            continue  # of float64 the registers hold fewer rows than a tensor core takes
        else:
            assert k["products"], k
            for instruction in k["products"]:
                assert types[k["compute"]] in instruction.split("."), (instruction, k)
                asynchronous = k["capability"] == 90 and k["compute"] == "bfloat16"
                assert not asynchronous or instruction.startswith("wgmma"), (instruction, k)


def test_programs_fit_into_a_multiprocessor(compiled):
    """Tiles in shared memory, and sums in registers. What follows the sums may put a few numbers aside, on the stack;
    sums that do not fit would be thousands of bytes, and go through memory in every step.
    """
    for k in compiled["matrix"]:
        assert k["shared"] <= SHARED[k["capability"]], k
        assert k["stack"] < 256, k
