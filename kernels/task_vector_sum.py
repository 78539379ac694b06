"""task_vector_sum in Triton; the formula is in ``seme/ops/task_vector_sum.py``.

One pass: reads the base and each input once, writes the output once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import divide, held, load, round_to, store
from .tables import Flat, flat, table

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def task_vector_sum_kernel(tensors, reals, out, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """tensors: the base, then the others. reals: divisor, scale, then the weights, in float64."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    base = load(tensors[0], offsets, mask, COMPUTE)
    merged = base
    for i in tl.static_range(1, len(tensors)):
        delta = round_to(load(tensors[i], offsets, mask, COMPUTE) - base, COMPUTE)
        part = round_to(delta * held(tl.load(reals + 1 + i), COMPUTE), COMPUTE)
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
    divisor: float,
    scale: float,
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; writes `out`."""
    import torch

    n = out.numel()
    if n == 0:
        return
    reals = table([divisor, scale, *weights], torch.float64, out.device)
    shape = shape or flat("task_vector_sum", out.device)
    task_vector_sum_kernel[(triton.cdiv(n, shape.elements),)](
        tuple(tensors), reals, out, n, COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options()
    )
