"""trimmed_l1 in Triton; the formula and its order of summation are in ``seme/ops/trimmed_l1.py``.

One launch per input. A program sums some blocks of 8192 elements at a time, as in ``inner_products.py``. Sums of rows,
which have to be sorted before, are left to torch, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from seme.native import BLOCK
from seme.ops.trimmed_l1 import reference

from .numeric import fold_lanes, load, magnitude_key, round_to
from .philox import drawn
from .selection import arguments, cut
from .tables import Flat, flat

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def above_in_rows(key, seen, cut, RANKED: tl.constexpr):
    """True where the key lies above the cut, in a row of each block, and the ties of each block so far."""
    threshold, left, ends = cut
    tie = key == threshold
    over = (key > threshold) | (tie & (left > 0)[:, None])
    if RANKED:  # noqa: SIM102 (the outer condition is known when the kernel is compiled)
        if tl.max(ends.to(tl.int32), axis=0) > 0:  # in one of these blocks
            ties = tie.to(tl.int32)
            rank = seen[:, None] + tl.cumsum(ties, 1)
            over = (key > threshold) | (tie & (rank <= left[:, None]))
            seen += tl.sum(ties, axis=1)
    return over, seen


@triton.jit
def trimmed_l1_kernel(
    base,
    x,
    cuts,
    tie_ends,
    draws,
    offset,
    out,
    n,
    i,
    count,
    blocks,
    CUTS: tl.constexpr,
    RANKED: tl.constexpr,
    DRAWN: tl.constexpr,
    ALIGNED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The sums of |delta| and of the kept |delta| of input i = x, of `count`, at out[block, i].

    The rest as in ties.py.
    """
    first = tl.program_id(0).to(tl.int64) * GROUP
    block = first + tl.arange(0, GROUP)
    there = block < blocks
    begin = (block * BLOCK)[:, None]
    if CUTS > 0:
        kept_cut = cut(cuts, tie_ends, i, block, blocks, RANKED, COMPUTE)
    if CUTS == 2:
        dropped_cut = cut(cuts, tie_ends, i + count, block, blocks, RANKED, COMPUTE)
    seen = tl.zeros([GROUP], dtype=tl.int32)  # ties with each cut in the rows before
    seen_dropped = tl.zeros([GROUP], dtype=tl.int32)
    everything = tl.zeros([GROUP, 64], dtype=tl.float64)
    kept = tl.zeros([GROUP, 64], dtype=tl.float64)
    for row in tl.range(0, tl.minimum(BLOCK // 64, tl.cdiv(n - first * BLOCK, 64)), loop_unroll_factor=4):
        offsets = begin + row * 64 + tl.arange(0, 64)[None, :]
        mask = offsets < n
        delta = round_to(load(x, offsets, mask, COMPUTE) - load(base, offsets, mask, COMPUTE), COMPUTE)
        key = magnitude_key(delta, COMPUTE)
        size = tl.abs(delta).to(tl.float64)
        keep = mask
        if CUTS > 0:
            over, seen = above_in_rows(key, seen, kept_cut, RANKED)
            keep = keep & over
        if CUTS == 2:
            over, seen_dropped = above_in_rows(key, seen_dropped, dropped_cut, RANKED)
            keep = keep & ~over
        if DRAWN:
            at = offset + begin + row * 64
            keep = keep & drawn(tl.load(draws + 2 * i + 1), tl.load(draws + 2 * i), at, 64, ALIGNED)
        everything += size
        kept += tl.where(keep, size, 0.0)
    entry = out + (block * count + i) * 2
    tl.store(entry, fold_lanes(everything, GROUP), mask=there)
    tl.store(entry + 1, fold_lanes(kept, GROUP), mask=there)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    compute_dtype: DType,
    shape: Flat | None = None,
    **selection: Any,
) -> None:
    """Run on flat, contiguous tensors, the base first; writes `out`, float64 [blocks or rows, n, 2] as one axis."""
    n, count = tensors[0].numel(), len(tensors) - 1
    if n == 0 or count == 0:
        return
    if selection["row"]:
        out.copy_(reference(tensors, compute_dtype=compute_dtype, **selection).view(-1))
        return
    chosen, constants = arguments(tensors, selection, compute_dtype, BLOCK)
    shape = shape or flat("trimmed_l1", out.device)
    blocks = triton.cdiv(n, BLOCK)
    for i in range(count):
        trimmed_l1_kernel[(triton.cdiv(n, shape.elements),)](
            tensors[0], tensors[i + 1], *chosen, out, n, i, count, blocks,
            **constants, COMPUTE=compute_dtype.name, BLOCK=BLOCK, GROUP=shape.elements // BLOCK, **shape.options(),
        )  # fmt: skip
