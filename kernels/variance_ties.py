"""variance_ties in Triton, and the counts per block that selections with a tie quota need; as ``tie_counts.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from seme.ops._task_vectors import UNLIMITED

from .numeric import key_bound, magnitude_key
from .tables import Flat, flat, table
from .variance import load_deltas, variance

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def variance_ties_kernel(tensors, thresholds, counts, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """tensors: the base, then the others. counts[block]: the variances whose key equals the threshold."""
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    _, deltas = load_deltas(tensors, offsets, mask, COMPUTE)
    tie = mask & (magnitude_key(variance(deltas, COMPUTE), COMPUTE) == key_bound(tl.load(thresholds), COMPUTE))
    tl.store(counts + block, tl.sum(tie.to(tl.int64), axis=0))


def block_ties(
    tensors: Sequence[torch.Tensor], thresholds: torch.Tensor, compute_dtype: DType, block: int
) -> torch.Tensor:
    """int64 [blocks]: how many variances of each block have the threshold for a key."""
    n = tensors[0].numel()
    counts = thresholds.new_empty(triton.cdiv(n, block))
    shape = flat("variance_ties", counts.device).holding(block)
    variance_ties_kernel[(len(counts),)](
        tuple(tensors), thresholds, counts, n, COMPUTE=compute_dtype.name, BLOCK=block, **shape.options()
    )
    return counts


def selection(
    tensors: Sequence[torch.Tensor],
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """(threshold and quota, running sums of :func:`block_ties`, whether those have to be read: the quota binds)."""
    import torch

    integers = table([thresholds[0], tie_quotas[0]], torch.int64, tensors[0].device)
    if not 0 < tie_quotas[0] < UNLIMITED:
        return integers, integers, False
    return integers, block_ties(tensors, integers, compute_dtype, block).cumsum(0), True


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    thresholds: Sequence[int],
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; adds to `out`, int64 [1]."""
    import torch

    if tensors[0].numel() == 0:
        return
    shape = shape or flat("variance_ties", out.device)
    counts = block_ties(tensors, table(thresholds, torch.int64, out.device), compute_dtype, shape.elements)
    out += counts.sum()
