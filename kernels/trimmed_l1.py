"""trimmed_l1 in Triton; the formula and its order of summation are in ``seme/ops/trimmed_l1.py``.

One launch per input; a program sums one block of 8192 elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from seme.native import BLOCK
from seme.ops._task_vectors import UNLIMITED

from .numeric import fold_lanes, key_bound, load, magnitude_key, round_to
from .tables import table
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
):
    """The sums of |delta| and of the kept |delta| of input i = x, at out[block, i].

    integers: threshold and tie quota of each of the `count` inputs, in int64; tie_ends[i, block]: ties of input i up
    to the end of the block, read only if RANKED: a quota binds.
    """
    block = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, 64)
    threshold = key_bound(tl.load(integers + 2 * i), COMPUTE)
    quota = tl.load(integers + 2 * i + 1)
    if RANKED:
        before = tl.load(tie_ends + i * blocks + block - 1, mask=block > 0, other=0)
        here = tl.load(tie_ends + i * blocks + block) - before
        quota -= before
        ends_here = (quota > 0) & (quota < here)
    seen = tl.zeros([], dtype=tl.int32)  # ties in the rows before
    everything = tl.zeros([64], dtype=tl.float64)
    kept = tl.zeros([64], dtype=tl.float64)
    for row in tl.range(0, tl.minimum(BLOCK // 64, tl.cdiv(n - block * BLOCK, 64)), loop_unroll_factor=8):
        offsets = block * BLOCK + row * 64 + lanes
        mask = offsets < n
        delta = round_to(load(x, offsets, mask, COMPUTE) - load(base, offsets, mask, COMPUTE), COMPUTE)
        key = magnitude_key(delta, COMPUTE)
        size = tl.abs(delta).to(tl.float64)
        tie = key == threshold
        keep = (key > threshold) | (tie & (quota > 0))
        if RANKED:  # noqa: SIM102 (the outer condition is known when the kernel is compiled)
            if ends_here:
                ties = tie.to(tl.int32)
                keep = (key > threshold) | (tie & (seen + tl.cumsum(ties, 0) <= quota))
                seen += tl.sum(ties, axis=0)
        everything += size
        kept += tl.where(keep, size, 0.0)
    entry = out + (block * count + i) * 2
    tl.store(entry, fold_lanes(everything))
    tl.store(entry + 1, fold_lanes(kept))


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
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
    blocks = triton.cdiv(n, BLOCK)
    for i in range(count):
        trimmed_l1_kernel[(blocks,)](
            tensors[0], tensors[i + 1], integers, tie_ends, out, n, i, count, blocks,
            RANKED=ranked, COMPUTE=compute_dtype.name, BLOCK=BLOCK, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
