"""The Triton kernels, in the interpreter on CPU tensors, give the bits of the reference."""

import importlib
import importlib.util
import os

import pytest
import torch

from seme.native import BLOCK
from seme.ops._registry import OPS

from .cases import DTYPES, SUMS, calls, check_bits, compare, make_tensors

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiled here: tests/gpu runs the kernels"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy, on inf and NaN
]


def launch(name, elements, blocks):
    """The launcher of a kernel, with a number of elements per program; reductions take whole blocks."""
    from seme.kernels.tables import Flat

    function = importlib.import_module(f"seme.kernels.{name}").launch
    shape = Flat(blocks * BLOCK if name in SUMS else elements, 4)
    return lambda *args, **kwargs: function(*args, **kwargs, shape=shape)


@pytest.mark.parametrize("dtype", ["bf16", "f32", "mixed-in-bf16", "mixed-in-f16", "mixed-in-f64"])
@pytest.mark.parametrize("name", OPS)
def test_bits(name, dtype):
    """All calls on tensors that end in the middle of a program; of the calls on smaller ones each takes one size."""
    stored, compute = DTYPES[dtype]
    for place, numel in enumerate((0, 1, 63, 1023)):
        tensors = make_tensors(name, numel, stored)
        found = calls(name, tensors, compute)
        for chosen, arguments in found if numel == 1023 or len(found) < 3 else found[place::3]:
            compare(launch(name, 256, 1), name, chosen, arguments, compute)


@pytest.mark.parametrize("dtype", ["bf16", "f64"])
@pytest.mark.parametrize("name", OPS)
def test_bits_over_several_blocks(name, dtype):
    """Of row_divergence, where a program takes a row: over several steps of it."""
    stored, compute = DTYPES[dtype]
    numel, elements = (2001, 16) if name == "row_divergence" else (20001, 4096)
    tensors = make_tensors(name, 2 * BLOCK + 65 if name in SUMS else numel, stored, count=2)
    chosen, arguments = calls(name, tensors, compute)[1 if name != "nonfinite" else 0]
    compare(launch(name, elements, 2), name, chosen, arguments, compute)


def test_through_the_op_with_views():
    op = OPS["ties"]
    wide = [t.view(40, 25).t() for t in make_tensors("ties", 1000, DTYPES["bf16"][0])]
    views = [t[1:, 3:] for t in wide]
    _, arguments = calls("ties", [v.reshape(-1) for v in views], DTYPES["bf16"][1])[1]
    arguments["compute_dtype"] = torch.bfloat16
    expected = op(views, backend="torch", **arguments)
    check_bits(op(views, backend="triton", **arguments), expected)
    out = torch.full((37, 24), float("nan"), dtype=torch.bfloat16).t()
    op(views, backend="triton", out=out, **arguments)
    check_bits(out.contiguous(), expected)


def test_in_place():
    for name in ("weighted_sum", "task_vector_sum"):
        tensors = make_tensors(name, 1023, DTYPES["f32"][0])
        _, arguments = calls(name, tensors, DTYPES["f32"][1])[-1]
        expected = OPS[name](tensors, backend="torch", **arguments)
        OPS[name](tensors, backend="triton", out=tensors[1], **arguments)
        check_bits(tensors[1], expected)
