"""selected_squares in Triton; the formula and its order of summation are in ``seme/ops/selected_squares.py``.

A program sums some blocks of 8192 elements, of one input: the variance of all is formed again for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from seme.native import BLOCK

from .numeric import fold_lanes, key_bound, magnitude_key, round_to
from .tables import Flat, flat
from .variance import load_deltas, variance
from .variance_ties import selection

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def selected_squares_kernel(
    tensors,
    integers,
    tie_ends,
    out,
    n,
    I: tl.constexpr,  # noqa: E741
    RANKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[block, I]: the sum of the squares of the selected elements of task vector I.

    integers: threshold and tie quota, in int64; tie_ends[block]: ties up to the end of the block, read only if RANKED.
    """
    first = tl.program_id(0).to(tl.int64) * GROUP
    block = first + tl.arange(0, GROUP)
    there = block * BLOCK < n
    lanes = block[:, None] * BLOCK + tl.arange(0, 64)[None, :]
    threshold = key_bound(tl.load(integers), COMPUTE)
    quota = tl.load(integers + 1)
    if RANKED:
        left = (quota - tl.load(tie_ends + block - 1, mask=there & (block > 0), other=0))[:, None]
    seen = tl.zeros([GROUP], dtype=tl.int32)  # ties in the rows before
    total = tl.zeros([GROUP, 64], dtype=tl.float64)
    for row in tl.range(0, tl.minimum(BLOCK // 64, tl.cdiv(n - first * BLOCK, 64))):
        offsets = lanes + row * 64
        mask = offsets < n
        _, deltas = load_deltas(tensors, offsets, mask, COMPUTE)
        key = magnitude_key(variance(deltas, COMPUTE), COMPUTE)
        tie = mask & (key == threshold)
        if RANKED:
            ties = tie.to(tl.int32)
            keep = (key > threshold) | (tie & (seen[:, None] + tl.cumsum(ties, 1) <= left))
            seen += tl.sum(ties, axis=1)
        else:
            keep = (key > threshold) | (tie & (quota > 0))
        delta = deltas[I]
        total += tl.where(mask & keep, round_to(delta * delta, COMPUTE), 0.0).to(tl.float64)
    tl.store(out + block * (len(tensors) - 1) + I, fold_lanes(total, GROUP), mask=there)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; writes `out`, float64 [blocks, n] seen as one axis."""
    n = tensors[0].numel()
    if n == 0:
        return
    shape = shape or flat("selected_squares", out.device)
    integers, tie_ends, ranked = selection(tensors, thresholds, tie_quotas, compute_dtype, BLOCK)
    for i in range(len(tensors) - 1):
        selected_squares_kernel[(triton.cdiv(n, shape.elements),)](
            tuple(tensors), integers, tie_ends, out, n, I=i, RANKED=ranked,
            COMPUTE=compute_dtype.name, BLOCK=BLOCK, GROUP=shape.elements // BLOCK, **shape.options(),
        )  # fmt: skip
