"""tie_counts in Triton, and the counts per block that the ops with a tie quota need.

A quota keeps the first so many of the elements whose key equals the threshold, in element order. A block knows its
share when it knows how many such elements lie before it: a first pass counts them per block, ``torch.cumsum`` adds
the counts up, and in the second pass only a block that the quota ends in has to rank its elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import key_bound, load, magnitude_key, round_to
from .tables import Flat, flat, table

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def tie_counts_kernel(
    tensors, thresholds, counts, n, blocks, CUTS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):
    """tensors: the base, then the others. counts[c * others + i, block]: the keys of tensor i that equal its threshold
    of cut c."""
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    base = load(tensors[0], offsets, mask, COMPUTE)
    for i in tl.static_range(1, len(tensors)):
        key = magnitude_key(round_to(load(tensors[i], offsets, mask, COMPUTE) - base, COMPUTE), COMPUTE)
        for c in tl.static_range(CUTS):
            at = c * (len(tensors) - 1) + i - 1
            tie = mask & (key == key_bound(tl.load(thresholds + at), COMPUTE))
            tl.store(counts + at * blocks + block, tl.sum(tie.to(tl.int64), axis=0))


def block_ties(
    tensors: Sequence[torch.Tensor],
    thresholds: torch.Tensor,
    compute_dtype: DType,
    block: int,
    shape: Flat | None = None,
) -> torch.Tensor:
    """int64 [thresholds, blocks]: how many keys of each block of `block` elements equal the threshold."""
    shape = (shape or flat("tie_counts", thresholds.device)).holding(block)
    blocks = triton.cdiv(tensors[0].numel(), block)
    counts = thresholds.new_empty(thresholds.numel(), blocks)
    tie_counts_kernel[(blocks,)](
        tuple(tensors), thresholds, counts, tensors[0].numel(), blocks,
        CUTS=thresholds.numel() // (len(tensors) - 1), COMPUTE=compute_dtype.name, BLOCK=block, **shape.options(),
    )  # fmt: skip
    return counts


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    thresholds: Sequence[int],
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; adds to `out`, int64 of every threshold."""
    import torch

    if tensors[0].numel() == 0 or len(tensors) == 1:
        return
    shape = shape or flat("tie_counts", out.device)
    counts = block_ties(tensors, table(thresholds, torch.int64, out.device), compute_dtype, shape.elements, shape)
    out += counts.sum(1)
