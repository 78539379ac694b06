"""The CUDA kernels, compiled for the CPU by an emulator (cuda_emulator.h), give the bits of the reference.

So their arithmetic, masks, order of summation and barriers are tested where there is no GPU.
"""

import pytest
import torch

from seme import dtypes
from seme.ops import cuda
from seme.ops._registry import OPS

from .cases import DTYPES, calls, check_bits, compare, make_tensors

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_bits(name, dtype):
    stored, compute = DTYPES[dtype]
    sizes = (0, 1, 7, 8, 63, 1023, 8191, 8193)
    for numel in sizes if name != "magnitude_histogram" else sizes[::3]:  # whose reference is slow
        tensors = make_tensors(name, numel, stored)
        for chosen, arguments in calls(name, tensors, compute):
            compare(getattr(cuda, name), name, chosen, arguments, compute)


@pytest.mark.parametrize("name", OPS)
def test_bits_of_unaligned_memory(name):
    stored, compute = DTYPES["mixed-in-bf16"]
    for offset in (1, 3):
        tensors = [t[offset:] for t in make_tensors(name, 2050 + offset, stored)]
        for chosen, arguments in calls(name, tensors, compute):
            compare(getattr(cuda, name), name, chosen, arguments, compute)


def test_quotas_over_many_blocks():
    stored, compute = DTYPES["bf16"]
    for name in ("ties", "trimmed_l1"):
        tensors = make_tensors(name, 65537, stored)
        for chosen, arguments in calls(name, tensors, compute):
            compare(getattr(cuda, name), name, chosen, arguments, compute)


@pytest.mark.parametrize("dtype", ["bf16", "bf16-in-f32"])
def test_histogram_in_shared_memory(dtype):
    stored, compute = DTYPES[dtype]
    tensors = make_tensors("magnitude_histogram", (1 << 20) + 13, stored, count=3)
    for chosen, arguments in calls("magnitude_histogram", tensors, compute)[:2]:
        compare(cuda.magnitude_histogram, "magnitude_histogram", chosen, arguments, compute)


def test_output_dtypes():
    tensors = make_tensors("weighted_sum", 1023, (dtypes.float64,))
    call = {"weights": [1.0] * 4, "divisor": 3.0, "compute_dtype": dtypes.float32}
    for out_dtype in dtypes.MERGEABLE:
        expected = OPS["weighted_sum"].reference(tensors, **call).to(out_dtype.to_torch())
        for offset in (0, 1):
            out = torch.full((1024,), 7.0, dtype=out_dtype.to_torch())[offset:][:1023]
            cuda.weighted_sum(tensors, out, **call)
            check_bits(out, expected)


def test_in_place():
    tensors = make_tensors("weighted_sum", 4099, (dtypes.float32,))
    expected = OPS["weighted_sum"](tensors, weights=[1.0, 2.0, 3.0, 4.0], backend="torch")
    cuda.weighted_sum(tensors, tensors[2], weights=[1.0, 2.0, 3.0, 4.0], divisor=1.0, compute_dtype=dtypes.float32)
    check_bits(tensors[2], expected)


def test_wrong_calls_are_refused(emulated):
    view = (64, 10, 0)
    with pytest.raises(ValueError, match="at most 32 tensors, got 33"):
        emulated.weighted_sum([view] * 33, [1.0] * 33, 1.0, 0, view, (0, 0))
    with pytest.raises(ValueError, match="weights: 1 expected, got 2"):
        emulated.weighted_sum([view], [1.0, 2.0], 1.0, 0, view, (0, 0))
    with pytest.raises(ValueError, match="differ in size"):
        emulated.weighted_sum([view, (64, 9, 0)], [1.0, 2.0], 1.0, 0, view, (0, 0))
    with pytest.raises(ValueError, match="elements of out: 10 expected, got 9"):
        emulated.weighted_sum([view], [1.0], 1.0, 0, (64, 9, 0), (0, 0))
    with pytest.raises(ValueError, match="null address"):
        emulated.nonfinite([(0, 10, 0)], (64, 1, -1), (0, 0))
    with pytest.raises(ValueError, match="dtype code 4 is not"):
        emulated.nonfinite([(64, 10, 4)], (64, 1, -1), (0, 0))
    with pytest.raises(ValueError, match="tie_ends: 1 expected, got 2"):
        emulated.trimmed_l1([view, view], ([0], [1], [], [], 0), (64, 2, -1), 0, (64, 2, 3), (0, 0))
