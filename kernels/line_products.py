"""line_products in Triton; the formula and its order of summation are in ``seme/ops/line_products.py``.

One launch per pair of tensors, so that n = 2 reads each input once. A program sums some blocks of elements at a time,
or some columns of one block; a thread's part is accessed in 16 bytes where blocks are multiples of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from seme.native import BLOCK

from .numeric import fold_lanes, load, round_to
from .tables import Flat, flat

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def element(x, base, offsets, mask, RELATIVE: tl.constexpr, COMPUTE: tl.constexpr):
    """Elements of x, or of x - base, in float64."""
    value = load(x, offsets, mask, COMPUTE)
    if RELATIVE:
        value = round_to(value - load(base, offsets, mask, COMPUTE), COMPUTE)
    return value.to(tl.float64)


@triton.jit
def line_products_kernel(
    x, y, base, out, n, i, j, count, length,
    RELATIVE: tl.constexpr, COMPUTE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The entries (i, i), (i, j), (j, i) and (j, j) of each block's count x count matrix, for x = i and y = j.

    length: elements of a block.
    """
    first = tl.program_id(0).to(tl.int64) * GROUP
    block = first + tl.arange(0, GROUP)
    lanes = tl.arange(0, 64)
    xx = tl.zeros([GROUP, 64], dtype=tl.float64)
    xy = tl.zeros([GROUP, 64], dtype=tl.float64)
    yy = tl.zeros([GROUP, 64], dtype=tl.float64)
    # Unrolled so that several rows are on their way at once; the sums stay in order.
    for row in tl.range(0, tl.cdiv(tl.minimum(length, n - first * length), 64), loop_unroll_factor=4):
        within = row * 64 + lanes
        offsets = block[:, None] * length + within[None, :]
        mask = (within < length)[None, :] & (offsets < n)
        a = element(x, base, offsets, mask, RELATIVE, COMPUTE)
        b = element(y, base, offsets, mask, RELATIVE, COMPUTE)
        xx += a * a
        xy += a * b
        yy += b * b
    matrix = out + block * count * count
    there = block * length < n
    cross = fold_lanes(xy, GROUP)
    tl.store(matrix + i * count + i, fold_lanes(xx, GROUP), mask=there)
    tl.store(matrix + i * count + j, cross, mask=there)
    tl.store(matrix + j * count + i, cross, mask=there)
    tl.store(matrix + j * count + j, fold_lanes(yy, GROUP), mask=there)


@triton.jit
def column_products_kernel(
    x, y, base, out, n, i, j, count, length, columns,
    RELATIVE: tl.constexpr, COMPUTE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The same entries of the columns' matrices, out [blocks, count, count, columns]."""
    block = tl.program_id(0).to(tl.int64)
    first = block * length
    rows = (tl.minimum(n, first + length) - first) // columns
    column = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    mask = column < columns
    xx = tl.zeros([WIDTH], dtype=tl.float64)
    xy = tl.zeros([WIDTH], dtype=tl.float64)
    yy = tl.zeros([WIDTH], dtype=tl.float64)
    offsets = first + column
    for _ in tl.range(0, rows):
        a = element(x, base, offsets, mask, RELATIVE, COMPUTE)
        b = element(y, base, offsets, mask, RELATIVE, COMPUTE)
        xx += a * a
        xy += a * b
        yy += b * b
        offsets += columns
    matrix = out + block * count * count * columns + column
    tl.store(matrix + (i * count + i) * columns, xx, mask=mask)
    tl.store(matrix + (i * count + j) * columns, xy, mask=mask)
    tl.store(matrix + (j * count + i) * columns, xy, mask=mask)
    tl.store(matrix + (j * count + j) * columns, yy, mask=mask)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    relative: bool,
    row: int,
    columns: int,
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors; writes `out`, float64 [blocks, n, n] or [blocks, n, n, columns] as one axis."""
    n, length = tensors[0].numel(), row or BLOCK
    if n == 0:
        return
    base, vectors = tensors[0], tensors[1:] if relative else tensors
    count = len(vectors)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)] or [(0, 0)]
    shape = shape or flat("line_products", out.device)
    common = {"RELATIVE": relative, "COMPUTE": compute_dtype.name, **shape.options()}
    for i, j in pairs:
        arguments = (vectors[i], vectors[j], base, out, n, i, j, count, length)
        if columns:
            grid = (triton.cdiv(n, length), triton.cdiv(columns, shape.elements))
            column_products_kernel[grid](*arguments, columns, **common, WIDTH=shape.elements)
        else:
            group = shape.elements // 64
            line_products_kernel[(triton.cdiv(n, group * length),)](*arguments, **common, GROUP=group)
