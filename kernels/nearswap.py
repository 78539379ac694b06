"""nearswap in Triton; the formula is in ``seme/ops/nearswap.py``.

One pass: reads both inputs once, writes the output once.
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
def nearswap_kernel(tensors, reals, out, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """tensors: the base and the other one. reals: t and the least distance, in float64."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    a = load(tensors[0], offsets, mask, COMPUTE)
    b = load(tensors[1], offsets, mask, COMPUTE)
    least = held(tl.load(reals + 1), COMPUTE)
    distance = tl.abs(round_to(a - b, COMPUTE))
    distance = tl.where(distance < least, least, distance)
    one = tl.full([BLOCK], 1, dtype=distance.dtype)
    share = round_to(round_to(divide(one, distance), COMPUTE) * held(tl.load(reals), COMPUTE), COMPUTE)
    share = tl.where(share < 0, 0 * one, share)
    share = tl.where(share > 1, one, share)
    kept = round_to(round_to(1 - share, COMPUTE) * a, COMPUTE)
    store(out, offsets, round_to(round_to(share * b, COMPUTE) + kept, COMPUTE), mask)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    t: float,
    least: float,
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on two flat, contiguous tensors, the base first; writes `out`."""
    import torch

    n = out.numel()
    if n == 0:
        return
    reals = table([t, least], torch.float64, out.device)
    shape = shape or flat("nearswap", out.device)
    nearswap_kernel[(triton.cdiv(n, shape.elements),)](
        tuple(tensors), reals, out, n, COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options()
    )
