"""weighted_sum in Triton; the formula is in ``seme/ops/weighted_sum.py``.

One pass: reads each input once, writes the output once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import divide, load, round_to, store

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def weighted_sum_kernel(tensors, scalars, out, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """scalars: the weights, then the divisor, in float64 (exact in the arithmetic type)."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    held: tl.constexpr = tl.float64 if COMPUTE == "float64" else tl.float32
    total = load(tensors[0], offsets, mask, COMPUTE) * tl.load(scalars).to(held)
    for i in tl.static_range(1, len(tensors)):
        total += load(tensors[i], offsets, mask, COMPUTE) * tl.load(scalars + i).to(held)
    divisor = tl.load(scalars + len(tensors)).to(held)
    store(out, offsets, round_to(divide(total, divisor), COMPUTE), mask)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    weights: Sequence[float],
    divisor: float,
    compute_dtype: DType,
    block: int = 1024,
) -> None:
    """Run on flat, contiguous tensors; writes `out`."""
    if out.numel() == 0:
        return
    scalars = out.new_tensor([*weights, divisor], dtype=_float64())
    grid = (triton.cdiv(out.numel(), block),)
    weighted_sum_kernel[grid](
        tuple(tensors), scalars, out, out.numel(), COMPUTE=compute_dtype.name, BLOCK=block, enable_fp_fusion=False
    )


def _float64() -> torch.dtype:
    import torch

    return torch.float64
