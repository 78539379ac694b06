"""row_divergence in Triton; the formula is in ``seme/ops/row_divergence.py``. A program takes a row, in three turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import held, load, round_to
from .tables import Flat, flat

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def shorten(x, ROUNDED: tl.constexpr, COMPUTE: tl.constexpr):
    """A float64 number, rounded to the compute dtype if ROUNDED."""
    if ROUNDED:
        return round_to(held(x, COMPUTE), COMPUTE).to(tl.float64)
    else:
        return x


@triton.jit
def softmax(x, greatest, total, ROUNDED: tl.constexpr, COMPUTE: tl.constexpr):
    """What is added 1e-8 to, as float64: e^(x - greatest) / total."""
    return shorten(shorten(tl.exp(x - greatest) / total, ROUNDED, COMPUTE) + 1e-8, ROUNDED, COMPUTE)


@triton.jit
def row_divergence_kernel(base, x, out, row, ROUNDED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """out[r], float64: the divergence of row r of x from that of the base."""
    r = tl.program_id(0).to(tl.int64)
    b_top = tl.full([BLOCK], float("-inf"), tl.float64)
    x_top = tl.full([BLOCK], float("-inf"), tl.float64)
    for begin in range(0, row, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        mask = columns < row
        b_row = load(base, r * row + columns, mask, COMPUTE).to(tl.float64)
        x_row = load(x, r * row + columns, mask, COMPUTE).to(tl.float64)
        b_top = tl.maximum(b_top, tl.where(mask, b_row, float("-inf")))
        x_top = tl.maximum(x_top, tl.where(mask, x_row, float("-inf")))
    b_greatest = tl.max(b_top, axis=0)
    x_greatest = tl.max(x_top, axis=0)
    b_sum = tl.zeros([BLOCK], tl.float64)
    x_sum = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, row, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        mask = columns < row
        b_row = load(base, r * row + columns, mask, COMPUTE).to(tl.float64)
        x_row = load(x, r * row + columns, mask, COMPUTE).to(tl.float64)
        b_sum += tl.where(mask, tl.exp(b_row - b_greatest), 0.0)
        x_sum += tl.where(mask, tl.exp(x_row - x_greatest), 0.0)
    b_total = tl.sum(b_sum, axis=0)
    x_total = tl.sum(x_sum, axis=0)
    divergence = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, row, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        mask = columns < row
        b_row = load(base, r * row + columns, mask, COMPUTE).to(tl.float64)
        x_row = load(x, r * row + columns, mask, COMPUTE).to(tl.float64)
        q = softmax(b_row, b_greatest, b_total, ROUNDED, COMPUTE)
        p = softmax(x_row, x_greatest, x_total, ROUNDED, COMPUTE)
        logarithm = shorten(tl.log(shorten(p / q, ROUNDED, COMPUTE)), ROUNDED, COMPUTE)
        divergence += tl.where(mask, shorten(p * logarithm, ROUNDED, COMPUTE), 0.0)
    found = tl.sum(divergence, axis=0)
    found = shorten(found, ROUNDED, COMPUTE) if ROUNDED else tl.where(found < 0, 0.0, found)
    tl.store(out + r, found)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    row: int,
    rounded: bool,
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; writes `out`, float64 [rows]."""
    if out.numel() == 0:
        return
    shape = shape or flat("row_divergence", out.device)
    row_divergence_kernel[(out.numel(),)](
        tensors[0], tensors[1], out, row,
        ROUNDED=rounded, COMPUTE=compute_dtype.name, BLOCK=min(shape.elements, triton.next_power_of_2(row)),
        **shape.options(),
    )  # fmt: skip
