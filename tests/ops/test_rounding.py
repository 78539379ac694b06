"""Rounding to the 16-bit dtypes, when storing and between operations, around every boundary between two values."""

import pytest
import torch

from seme import native
from seme.ops import weighted_sum
from tests.kernels.cases import check_bits

pytestmark = pytest.mark.skipif(native.why_not("_C") is not None, reason="seme._C is not built: SEME_NATIVE=1")


def around_boundaries(dtype):
    """Every value of a 16-bit dtype, the middle to the next one, and the float32 neighbours of both."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    step = {torch.float16: 1 << 13, torch.bfloat16: 1 << 16}[dtype]
    bits = torch.cat([values.view(torch.int32), values.view(torch.int32) + step // 2])
    # Below the normal float16 numbers the middles are elsewhere: multiples of half the smallest one.
    small = torch.arange(-4200, 4200).double() * 2.0**-25
    bits = torch.cat([bits, small.float().view(torch.int32)])
    return torch.cat([bits - 1, bits, bits + 1]).view(torch.float32)


@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_boundaries(dtype, isa):
    module = native.module()
    if isa > module.best_isa():
        pytest.skip("this machine does not have the instruction set")
    values = around_boundaries(dtype)
    expected = values.to(dtype)
    module.set_isa(isa)
    try:
        stored = weighted_sum([values], [1.0], out_dtype=dtype, backend="cpu")
        rounded = weighted_sum([values], [1.0], compute_dtype=dtype, backend="cpu")
    finally:
        module.set_isa(module.best_isa())
    check_bits(stored, expected)
    check_bits(rounded, expected.float())
