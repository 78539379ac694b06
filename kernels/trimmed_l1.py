"""trimmed_l1 in Triton; the formula and its order of summation are in ``seme/ops/trimmed_l1.py``.

One launch per input. A program sums some blocks of 8192 elements at a time, as in ``inner_products.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from seme.native import BLOCK
from seme.ops._task_vectors import UNLIMITED

from .numeric import fold_lanes, key_bound, load, magnitude_key, round_to
from .tables import Flat, flat, table
from .tie_counts import block_ties

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def trimmed_l1_kernel(
    base,
    x,
    integers,
    tie_ends,
    out,
    n,
    i,
    count,
    blocks,
    RANKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The sums of |delta| and of the kept |delta| of input i = x, at out[block, i].

    integers: threshold and tie quota of each of the `count` inputs, in int64; tie_ends[i, block]: ties of input i up
    to the end of the block, read only if RANKED: a quota binds.
    """
    first = tl.program_id(0).to(tl.int64) * GROUP
    block = first + tl.arange(0, GROUP)
    there = block < blocks
    lanes = block[:, None] * BLOCK + tl.arange(0, 64)[None, :]
    threshold = key_bound(tl.load(integers + 2 * i), COMPUTE)
    quota = tl.load(integers + 2 * i + 1)
    left = tl.zeros([GROUP], dtype=tl.int64) + quota
    if RANKED:
        ends = tie_ends + i * blocks + block
        before = tl.load(ends - 1, mask=there & (block > 0), other=0)
        left -= before
        ends_here = (left > 0) & (left < tl.load(ends, mask=there, other=0) - before)
        ranked = tl.max(ends_here.to(tl.int32), axis=0) > 0  # in one of these blocks
    some = (left > 0)[:, None]
    seen = tl.zeros([GROUP], dtype=tl.int32)  # ties in the rows before
    everything = tl.zeros([GROUP, 64], dtype=tl.float64)
    kept = tl.zeros([GROUP, 64], dtype=tl.float64)
    for row in tl.range(0, tl.minimum(BLOCK // 64, tl.cdiv(n - first * BLOCK, 64)), loop_unroll_factor=4):
        offsets = lanes + row * 64
        mask = offsets < n
        delta = round_to(load(x, offsets, mask, COMPUTE) - load(base, offsets, mask, COMPUTE), COMPUTE)
        key = magnitude_key(delta, COMPUTE)
        size = tl.abs(delta).to(tl.float64)
        tie = key == threshold
        keep = (key > threshold) | (tie & some)
        if RANKED:  # noqa: SIM102 (the outer condition is known when the kernel is compiled)
            if ranked:
                ties = tie.to(tl.int32)
                rank = seen[:, None] + tl.cumsum(ties, 1)
                keep = (key > threshold) | (tie & (rank <= left[:, None]))
                seen += tl.sum(ties, axis=1)
        everything += size
        kept += tl.where(keep, size, 0.0)
    entry = out + (block * count + i) * 2
    tl.store(entry, fold_lanes(everything, GROUP), mask=there)
    tl.store(entry + 1, fold_lanes(kept, GROUP), mask=there)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; writes `out`, float64 [blocks, n, 2] seen as one axis."""
    import torch

    n, count = tensors[0].numel(), len(tensors) - 1
    if n == 0 or count == 0:
        return
    integers = table([v for pair in zip(thresholds, tie_quotas) for v in pair], torch.int64, out.device)
    ranked = any(0 < quota < UNLIMITED for quota in tie_quotas)
    tie_ends = integers
    if ranked:
        tie_ends = block_ties(tensors, integers[::2].contiguous(), compute_dtype, BLOCK).cumsum(1)
    shape = shape or flat("trimmed_l1", out.device)
    blocks = triton.cdiv(n, BLOCK)
    for i in range(count):
        trimmed_l1_kernel[(triton.cdiv(n, shape.elements),)](
            tensors[0], tensors[i + 1], integers, tie_ends, out, n, i, count, blocks,
            RANKED=ranked, COMPUTE=compute_dtype.name, BLOCK=BLOCK, GROUP=shape.elements // BLOCK, **shape.options(),
        )  # fmt: skip
