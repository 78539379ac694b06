"""task_vector_sum in Triton; the formula is in ``seme/ops/task_vector_sum.py``.

One pass: reads the base and each input once, writes the output once. One more to count if a tie quota binds.
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
def task_vector_sum_kernel(
    tensors,
    reals,
    cuts,
    tie_ends,
    draws,
    offset,
    out,
    n,
    blocks,
    CUTS: tl.constexpr,
    RANKED: tl.constexpr,
    DRAWN: tl.constexpr,
    ALIGNED: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tensors: the base, then the others. reals: divisor, scale, then weight and factor of each, in float64.

    The rest as in ties.py.
    """
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    base = load(tensors[0], offsets, mask, COMPUTE)
    merged = base
    for i in tl.static_range(1, len(tensors)):
        delta = round_to(load(tensors[i], offsets, mask, COMPUTE) - base, COMPUTE)
        part = kept(
            delta, tl.arange(0, BLOCK), cuts, tie_ends, draws, offset, i - 1, len(tensors) - 1, block, blocks,
            CUTS, RANKED, DRAWN, ALIGNED, COMPUTE,
        )  # fmt: skip
        factor = held(tl.load(reals + 2 * i + 1), COMPUTE)
        if factor != 1:
            part = round_to(part * factor, COMPUTE)
        part = round_to(part * held(tl.load(reals + 2 * i), COMPUTE), COMPUTE)
        if i == 1:
            total = part
        else:
            total += part
    if len(tensors) > 1:
        total = round_to(total, COMPUTE)
        divisor = held(tl.load(reals), COMPUTE)
        scale = held(tl.load(reals + 1), COMPUTE)
        if divisor != 1:
            total = round_to(divide(total, divisor), COMPUTE)
        if scale != 1:
            total = round_to(total * scale, COMPUTE)
        merged = round_to(base + total, COMPUTE)
    store(out, offsets, merged, mask)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    weights: Sequence[float],
    factors: Sequence[float],
    divisor: float,
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
    reals = table([divisor, scale, *(v for pair in zip(weights, factors) for v in pair)], torch.float64, out.device)
    shape = shape or flat("task_vector_sum", out.device)
    tensors, selection = ranked(tensors, selection, compute_dtype)
    chosen, constants = arguments(tensors, selection, compute_dtype, shape.elements)
    blocks = triton.cdiv(n, shape.elements)
    task_vector_sum_kernel[(blocks,)](
        tuple(tensors), reals, *chosen, out, n, blocks,
        **constants, COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options(),
    )  # fmt: skip
