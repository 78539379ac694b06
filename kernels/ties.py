"""ties in Triton; the formula is in ``seme/ops/ties.py``.

One pass, and one more to count if a tie quota binds (``tie_counts.py``). The sign that wins is known only after
all inputs have been read; so the sums are kept for both signs, and the inputs are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from seme.ops._task_vectors import ranked

from .numeric import divide, held, load, round_to, store
from .selection import arguments, kept
from .tables import Flat, flat, table

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def ties_kernel(
    tensors,
    reals,
    cuts,
    tie_ends,
    draws,
    offset,
    out,
    n,
    blocks,
    NORMALIZE: tl.constexpr,
    CUTS: tl.constexpr,
    RANKED: tl.constexpr,
    DRAWN: tl.constexpr,
    ALIGNED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tensors: the base, then the others.

    reals: scale, then weight and factor of each input, in float64; cuts: threshold and tie quota of each cut, in int64;
    tie_ends[cut, block]: ties up to the end of the block, read only if RANKED: a quota binds; draws: chance and key of
    each input, read only if DRAWN; offset: index of the first element.
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
        delta = round_to(load(tensors[i], offsets, mask, COMPUTE) - base, COMPUTE)
        part = kept(
            delta, tl.arange(0, BLOCK), cuts, tie_ends, draws, offset, i - 1, len(tensors) - 1, block, blocks,
            CUTS, RANKED, DRAWN, ALIGNED, COMPUTE,
        )  # fmt: skip
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
    factors: Sequence[float],
    normalize: bool,
    scale: float,
    compute_dtype: DType,
    shape: Flat | None = None,
    **selection: Any,
) -> None:
    """Run on flat, contiguous tensors, the base first; writes `out`."""
    import torch

    n = out.numel()
    if n == 0:
        return
    reals = table([scale, *(v for pair in zip(weights, factors) for v in pair)], torch.float64, out.device)
    shape = shape or flat("ties", out.device)
    tensors, selection = ranked(tensors, selection, compute_dtype)
    chosen, constants = arguments(tensors, selection, compute_dtype, shape.elements)
    blocks = triton.cdiv(n, shape.elements)
    ties_kernel[(blocks,)](
        tuple(tensors), reals, *chosen, out, n, blocks,
        NORMALIZE=normalize, **constants, COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options(),
    )  # fmt: skip
