"""ties in Triton; the formula is in ``seme/ops/ties.py``.

One pass, and one more to count if a tie quota binds (``tie_counts.py``). The sign that wins is known only after
all inputs have been read; so the sums are kept for both signs, and the inputs are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from seme.ops._task_vectors import UNLIMITED

from .numeric import divide, held, key_bound, load, magnitude_key, round_to, store
from .tables import Flat, flat, table
from .tie_counts import block_ties

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def ties_kernel(
    tensors,
    reals,
    integers,
    tie_ends,
    out,
    n,
    blocks,
    NORMALIZE: tl.constexpr,
    RANKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tensors: the base, then the others.

    reals: scale, then weight and factor of each input, in float64; integers: threshold and tie quota of each, in
    int64; tie_ends[i, block]: ties of input i up to the end of the block, read only if RANKED: a quota binds.
    """
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    base = load(tensors[0], offsets, mask, COMPUTE)
    total = tl.zeros_like(base)
    plus = tl.zeros_like(base)
    minus = tl.zeros_like(base)
    plus_weight = tl.zeros_like(base)
    minus_weight = tl.zeros_like(base)
    for i in tl.static_range(1, len(tensors)):
        weight = held(tl.load(reals + 2 * i - 1), COMPUTE)
        factor = held(tl.load(reals + 2 * i), COMPUTE)
        threshold = key_bound(tl.load(integers + 2 * i - 2), COMPUTE)
        quota = tl.load(integers + 2 * i - 1)
        delta = round_to(load(tensors[i], offsets, mask, COMPUTE) - base, COMPUTE)
        key = magnitude_key(delta, COMPUTE)
        tie = key == threshold
        if RANKED:
            before = tl.load(tie_ends + (i - 1) * blocks + block - 1, mask=block > 0, other=0)
            here = tl.load(tie_ends + (i - 1) * blocks + block) - before
            quota -= before
            if (quota > 0) & (quota < here):
                tie = tie & (tl.cumsum(tie.to(tl.int32), 0) <= quota)
        part = tl.where((key > threshold) | (tie & (quota > 0)), delta, 0.0)
        if factor != 1:
            part = round_to(part * factor, COMPUTE)
        part = round_to(part * weight, COMPUTE)
        for_plus = tl.where(part > 0, 1.0, 0.0)
        for_minus = tl.where(part < 0, 1.0, 0.0)
        total += part
        plus += part * for_plus
        minus += part * for_minus
        plus_weight += weight * for_plus
        minus_weight += weight * for_minus
    positive = round_to(total, COMPUTE) >= 0
    merged = round_to(tl.where(positive, plus, minus), COMPUTE)
    if NORMALIZE:
        divisor = round_to(tl.where(positive, plus_weight, minus_weight), COMPUTE)
        merged = round_to(divide(merged, tl.where(divisor == 0, 1.0, divisor)), COMPUTE)
    scale = held(tl.load(reals), COMPUTE)
    if scale != 1:
        merged = round_to(merged * scale, COMPUTE)
    store(out, offsets, round_to(base + merged, COMPUTE), mask)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    weights: Sequence[float],
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    factors: Sequence[float],
    normalize: bool,
    scale: float,
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; writes `out`."""
    import torch

    n = out.numel()
    if n == 0:
        return
    reals = table([scale, *(v for pair in zip(weights, factors) for v in pair)], torch.float64, out.device)
    integers = table([v for pair in zip(thresholds, tie_quotas) for v in pair], torch.int64, out.device)
    shape = shape or flat("ties", out.device)
    ranked = any(0 < quota < UNLIMITED for quota in tie_quotas)
    tie_ends = integers
    if ranked:
        tie_ends = block_ties(tensors, integers[::2].contiguous(), compute_dtype, shape.elements).cumsum(1)
    blocks = triton.cdiv(n, shape.elements)
    ties_kernel[(blocks,)](
        tuple(tensors), reals, integers, tie_ends, out, n, blocks,
        NORMALIZE=normalize, RANKED=ranked, COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options(),
    )  # fmt: skip
