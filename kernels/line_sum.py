"""line_sum in Triton; the formula is in ``seme/ops/line_sum.py``.

One pass: reads each input once, writes the output once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from seme.ops._weights import here

from .numeric import held, load, round_to, store
from .tables import Flat, flat, table

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def weight(table, i, offsets, mask, count, size, first, SETS: tl.constexpr, COMPUTE: tl.constexpr):
    """The weight of tensor i at `offsets`, in the arithmetic type; a scalar if all elements have the same.

    table: [count] for SETS "none", [rows, count] for "row", [count, size] for "columns"; size: elements of a row;
    first: number of the first element (see ``seme/ops/_weights.py``).
    """
    if SETS == "row":
        return held(tl.load(table + offsets // size * count + i, mask=mask, other=0.0), COMPUTE)
    elif SETS == "columns":
        return held(tl.load(table + i * size + (offsets + first) % size, mask=mask, other=0.0), COMPUTE)
    else:
        return held(tl.load(table + i), COMPUTE)


@triton.jit
def line_sum_kernel(
    tensors,
    weights,
    out,
    n,
    size,
    first,
    SETS: tl.constexpr,
    RELATIVE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """tensors: the base first, if RELATIVE. weights, size, first: see :func:`weight`."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    base = load(tensors[0], offsets, mask, COMPUTE)
    total = tl.zeros([BLOCK], dtype=base.dtype)
    count: tl.constexpr = len(tensors) - RELATIVE
    for i in tl.static_range(count):
        w = weight(weights, i, offsets, mask, count, size, first, SETS, COMPUTE)
        x = load(tensors[i + RELATIVE], offsets, mask, COMPUTE)
        if RELATIVE:
            total += round_to(round_to(x - base, COMPUTE) * w, COMPUTE)
        else:
            total += x * w
    total = round_to(total, COMPUTE)
    if RELATIVE:
        total = round_to(base + total, COMPUTE)
    store(out, offsets, total, mask)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    weights: Sequence[float],
    relative: bool,
    row: int,
    columns: int,
    offset: int,
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors; writes `out`."""
    import torch

    n = out.numel()
    if n == 0:
        return
    values = list(here(weights, len(tensors) - relative, n, row, offset))
    shape = shape or flat("line_sum", out.device)
    line_sum_kernel[(triton.cdiv(n, shape.elements),)](
        tuple(tensors),
        table(values, torch.float64, out.device),
        out,
        n,
        row or columns or 1,
        offset,
        SETS="row" if row else "columns" if columns else "none",
        RELATIVE=int(relative),
        COMPUTE=compute_dtype.name,
        BLOCK=shape.elements,
        **shape.options(),
    )
