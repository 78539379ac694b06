"""weighted_sum in Triton; the formula is in ``seme/ops/weighted_sum.py``.

One pass: reads each input once, writes the output once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import divide, held, load, round_to, store
from .tables import Flat, flat, table

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def weighted_sum_kernel(tensors, reals, out, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """reals: the weights, then the divisor, in float64."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    total = load(tensors[0], offsets, mask, COMPUTE) * held(tl.load(reals), COMPUTE)
    for i in tl.static_range(1, len(tensors)):
        total += load(tensors[i], offsets, mask, COMPUTE) * held(tl.load(reals + i), COMPUTE)
    divisor = held(tl.load(reals + len(tensors)), COMPUTE)
    if divisor != 1:
        total = divide(total, divisor)
    store(out, offsets, round_to(total, COMPUTE), mask)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    weights: Sequence[float],
    divisor: float,
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors; writes `out`."""
    import torch

    n = out.numel()
    if n == 0:
        return
    reals = table([*weights, divisor], torch.float64, out.device)
    shape = shape or flat("weighted_sum", out.device)
    weighted_sum_kernel[(triton.cdiv(n, shape.elements),)](
        tuple(tensors), reals, out, n, COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options()
    )
