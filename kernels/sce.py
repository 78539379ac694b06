"""sce in Triton; the formula is in ``seme/ops/sce.py``.

One pass, and one more to count if the tie quota binds (``variance_ties.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import divide, held, key_bound, magnitude_key, round_to, store
from .tables import Flat, flat, table
from .variance import load_deltas, variance
from .variance_ties import selection

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def sce_kernel(
    tensors,
    reals,
    integers,
    tie_ends,
    out,
    n,
    RANKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tensors: the base, then the others. reals: the least divisor, then the coefficients, in float64.

    integers: threshold and tie quota, in int64; tie_ends[block]: ties up to the end of the block, read only if RANKED.
    """
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    base, deltas = load_deltas(tensors, offsets, mask, COMPUTE)
    threshold = key_bound(tl.load(integers), COMPUTE)
    quota = tl.load(integers + 1)
    key = magnitude_key(variance(deltas, COMPUTE), COMPUTE)
    tie = mask & (key == threshold)
    if RANKED:
        quota -= tl.load(tie_ends + block - 1, mask=block > 0, other=0)
        tie = tie & (tl.cumsum(tie.to(tl.int32), 0) <= quota)
    keep = (key > threshold) | (tie & (quota > 0))
    total = tl.zeros_like(base)
    for i in tl.static_range(len(deltas)):
        total += tl.where(keep, deltas[i], 0.0)
    positive = round_to(total, COMPUTE) >= 0
    merged = tl.zeros_like(base)
    share = tl.zeros_like(base)
    for i in tl.static_range(len(deltas)):
        coefficient = held(tl.load(reals + 1 + i), COMPUTE)
        delta = tl.where(keep, deltas[i], 0.0)
        agrees = tl.where(tl.where(positive, delta > 0, delta < 0), 1.0, 0.0)
        merged += round_to(coefficient * delta, COMPUTE) * agrees
        share += coefficient * agrees
    least = held(tl.load(reals), COMPUTE)
    share = round_to(share, COMPUTE)
    share = tl.where(share < least, least, share)
    merged = round_to(divide(round_to(merged, COMPUTE), share), COMPUTE)
    store(out, offsets, round_to(base + merged, COMPUTE), mask)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    coefficients: Sequence[float],
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; writes `out`."""
    import torch

    from seme import dtypes
    from seme.ops.sce import LEAST_DIVISOR

    n = out.numel()
    if n == 0:
        return
    shape = shape or flat("sce", out.device)
    integers, tie_ends, ranked = selection(tensors, thresholds, tie_quotas, compute_dtype, shape.elements)
    reals = table([dtypes.round_to(compute_dtype, LEAST_DIVISOR), *coefficients], torch.float64, out.device)
    sce_kernel[(triton.cdiv(n, shape.elements),)](
        tuple(tensors), reals, integers, tie_ends, out, n,
        RANKED=ranked, COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options(),
    )  # fmt: skip
