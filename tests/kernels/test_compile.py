"""Every Triton kernel compiles for GPUs, without a GPU.

What the interpreter accepts, the compiler need not. The element-wise ones compile to arithmetic that rounds each
operation: an fma, an approximate division or subnormal numbers that become zero would show only in the bits of a
result on a GPU. Those with matrix products compile to instructions of the tensor cores, and fit into a multiprocessor.
"""

from pathlib import Path

import pytest

from scripts.kernel_resources import CAPABILITIES
from seme.ops._registry import MATRIX_OPS, OPS

ROOT = Path(__file__).resolve().parents[2]
HELPERS = {"__init__", "importance", "numeric", "philox", "selection", "tables", "tiles", "variance"}
BOUNDED = {"row_divergence"}  # held to an error bound: exp and log may use what they like
MATRIX = {path.stem for path in (ROOT / "kernels").glob("*.py") if "from .tiles import" in path.read_text()}
KERNELS = {path.stem for path in (ROOT / "kernels").glob("*.py")} - HELPERS - MATRIX
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes that one program can have


def test_every_op_has_a_kernel():
    assert OPS.keys() == KERNELS
    assert MATRIX_OPS.keys() == MATRIX


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
        for instruction in k["float_instructions"] if k["kernel"] not in BOUNDED else ():
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


def test_tensors_are_accessed_in_16_bytes(compiled):
    """Where they, their length and their rows are multiples of 16; of single numbers, in tables and results, 8 bytes
    each."""
    wide = {"v4.b32", "v2.b64"}
    aligned = [k for k in compiled["kernels"] if k["integer"] != "1"]
    assert {k["kernel"] for k in aligned} == KERNELS
    for k in aligned:
        loads, stores = (
            {a.removeprefix(f"{kind}.") for a in k["accesses"] if a.startswith(kind)} for kind in ("ld", "st")
        )
        assert loads & wide, k
        assert loads <= wide | {"b64"}, k
        assert stores <= (wide if k["writes"] else wide | {"b64"}), k
        assert stores or not k["writes"], k


def test_offsets_are_64_bits_wide(compiled):
    """A tensor may have more than 2^31 elements: nothing is computed from the program's number in 32 bits by an
    element-wise kernel, and no address of a tile by the others."""
    for k in compiled["kernels"] + compiled["matrix"]:
        assert not k["narrow_offsets"], k


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
