"""nonfinite in Triton: counts the elements whose exponent bits are all ones, in the dtype they are stored in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import load_bits
from .tables import Flat, flat

if TYPE_CHECKING:
    import torch


@triton.jit
def nonfinite_kernel(x, total, n, EXPONENT: tl.constexpr, BLOCK: tl.constexpr):
    """Adds to `total`, int64 [1]. EXPONENT: the exponent bits of x's dtype."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = load_bits(x, offsets, offsets < n)
    found = tl.sum(((bits & EXPONENT) == EXPONENT).to(tl.int64), axis=0)
    tl.atomic_add(total, found, mask=found > 0, sem="relaxed")


def launch(tensors: Sequence[torch.Tensor], out: torch.Tensor, *, shape: Flat | None = None) -> None:
    """Run on flat, contiguous tensors; adds to `out`, int64 [n]."""
    import torch

    exponent = {
        torch.float64: 0x7FF0000000000000,
        torch.float32: 0x7F800000,
        torch.bfloat16: 0x7F80,
        torch.float16: 0x7C00,
    }
    shape = shape or flat("nonfinite", out.device)
    for i, x in enumerate(tensors):
        if x.numel():
            nonfinite_kernel[(triton.cdiv(x.numel(), shape.elements),)](
                x, out[i:], x.numel(), EXPONENT=exponent[x.dtype], BLOCK=shape.elements, **shape.options()
            )
