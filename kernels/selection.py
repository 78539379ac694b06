"""What a kernel keeps of task vectors; the arguments are those of ``seme.ops._task_vectors.check_selection``.

Ranks within rows take a sort: launchers leave them to ``seme.ops._task_vectors.ranked`` and pass on what that gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from seme.ops._op import Params
from seme.ops._task_vectors import UNLIMITED

from .numeric import key_bound, magnitude_key
from .philox import drawn
from .tables import table
from .tie_counts import block_ties

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def cut(cuts, tie_ends, at, block, blocks, RANKED: tl.constexpr, COMPUTE: tl.constexpr):
    """Cut number `at` in one or more blocks: its threshold, what is left of its quota, and whether that ends there."""
    threshold = key_bound(tl.load(cuts + 2 * at), COMPUTE)
    quota = tl.load(cuts + 2 * at + 1) + 0 * block
    ends = quota < 0
    if RANKED:
        there = block < blocks
        before = tl.load(tie_ends + at * blocks + block - 1, mask=there & (block > 0), other=0)
        here = tl.load(tie_ends + at * blocks + block, mask=there, other=0) - before
        quota -= before
        ends = (quota > 0) & (quota < here)
    return threshold, quota, ends


@triton.jit
def above(key, cut, RANKED: tl.constexpr):
    """True where the key, of a block, lies above the cut."""
    threshold, quota, ends = cut
    tie = key == threshold
    over = (key > threshold) | (tie & (quota > 0))
    if RANKED:  # noqa: SIM102 (the outer condition is known when the kernel is compiled)
        if ends:
            over = (key > threshold) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= quota))
    return over


@triton.jit
def kept(
    delta,
    places,
    cuts,
    tie_ends,
    draws,
    offset,
    i,
    count,
    block,
    blocks,
    CUTS: tl.constexpr,
    RANKED: tl.constexpr,
    DRAWN: tl.constexpr,
    ALIGNED: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """A block of task vector i of `count`, 0 where the element is not kept. `places` of its elements count from 0."""
    part = delta
    key = magnitude_key(delta, COMPUTE)
    for c in tl.static_range(CUTS):
        chosen = cut(cuts, tie_ends, i + c * count, block, blocks, RANKED, COMPUTE)
        part = tl.where(above(key, chosen, RANKED) == (c == 0), part, 0.0)
    if DRAWN:
        first = offset + block * places.shape[0]
        stays = drawn(tl.load(draws + 2 * i + 1), tl.load(draws + 2 * i), first, places.shape[0], ALIGNED)
        part = tl.where(stays, part, 0.0)
    return part


def arguments(
    tensors: Sequence[torch.Tensor], selection: Params, compute_dtype: DType, block: int
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], dict[str, Any]]:
    """What the kernels that select take, and the constants: threshold and quota of each cut; the ties with each up to
    the end of each block; chance and key of each task vector; the offset. A program has ``block`` elements."""
    import torch

    thresholds, quotas = selection["thresholds"], selection["tie_quotas"]
    ranked = any(0 < quota < UNLIMITED for quota in quotas)
    cuts = table([v for pair in zip(thresholds, quotas) for v in pair], torch.int64, tensors[0].device)
    tie_ends = cuts
    if ranked:
        tie_ends = block_ties(tensors, cuts[::2].contiguous(), compute_dtype, block).cumsum(1)
    pairs = zip(selection["chances"], selection["seeds"])
    draws = table([v for pair in pairs for v in pair], torch.int64, tensors[0].device)
    offset = selection["offset"]
    constants = {
        "CUTS": len(thresholds) // max(1, len(tensors) - 1),
        "RANKED": ranked,
        "DRAWN": len(draws) > 0,
        "ALIGNED": offset % 8 == 0,
    }
    return (cuts, tie_ends, draws, offset), constants
