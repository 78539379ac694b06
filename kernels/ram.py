"""ram in Triton; the formula is in ``seme/ops/ram.py``. One pass: reads each input once, writes the output once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import divide, held, round_to, store
from .tables import Flat, flat, table
from .variance import load_deltas

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def changes(delta, epsilon):
    """1 where a task vector changes the base, else 0; NaN does."""
    return tl.where((delta >= -epsilon) & (delta <= epsilon), 0.0, 1.0)


@triton.jit
def ram_kernel(tensors, reals, out, n, ROUNDED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """tensors: the base, then the others. reals: epsilon, then the scales, in float64."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    base, deltas = load_deltas(tensors, offsets, mask, COMPUTE)
    epsilon = held(tl.load(reals), COMPUTE)
    count = tl.zeros_like(base)
    for i in tl.static_range(len(deltas)):
        count += changes(deltas[i], epsilon)
    total = tl.zeros_like(base)
    for i in tl.static_range(len(deltas)):
        part = tl.where(changes(deltas[i], epsilon) != 0, deltas[i], 0.0)
        shared = round_to(divide(part, tl.where(count > 1, count, 1.0)), COMPUTE)
        total += tl.where(count > 1, shared, part * held(tl.load(reals + 1 + i), COMPUTE))
    merged = round_to(base + round_to(total, COMPUTE), COMPUTE) if ROUNDED else base + total
    store(out, offsets, merged, mask)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    scales: Sequence[float],
    epsilon: float,
    rounded: bool,
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; writes `out`."""
    import torch

    n = out.numel()
    if n == 0:
        return
    shape = shape or flat("ram", out.device)
    reals = table([epsilon, *scales], torch.float64, out.device)
    ram_kernel[(triton.cdiv(n, shape.elements),)](
        tuple(tensors), reals, out, n,
        ROUNDED=rounded, COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options(),
    )  # fmt: skip
