"""Tiles of matrices, which the matrix kernels are made of.

A matrix comes with its two strides, so that transposed views are read where they lie. Where a tile sticks out of the
matrix it is 0, and a 0 adds nothing to a product. Offsets are 64 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric import accumulator, load, lost, operand, product, store


@triton.jit
def indices(tile, SIZE: tl.constexpr):
    """The rows (or columns) of the `tile`-th tile of SIZE, int64."""
    return (tl.full([SIZE], 0, tl.int64) + tile) * SIZE + tl.arange(0, SIZE)


@triton.jit
def own_tile(height, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(i, j): which tile of a matrix [height, width] this program of a one-dimensional grid computes.

    8 rows of tiles run at the same time, so that what they read is in the L2 cache.
    """
    down, across = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    at = tl.program_id(0)
    return tl.swizzle2d(at // across, at % across, down, across, 8)


@triton.jit
def load_tile(ptr, rows, columns, row_stride, column_stride, row_end, column_end, COMPUTE: tl.constexpr):
    """The tile [rows, columns] in the arithmetic type of COMPUTE, 0 outside of the matrix."""
    mask = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    return load(ptr, rows[:, None] * row_stride + columns[None, :] * column_stride, mask, COMPUTE)


@triton.jit
def store_tile(ptr, x, rows, columns, row_stride, column_stride, row_end, column_end):
    """x at [rows, columns], as far as it lies in the matrix, rounded once to the dtype of the matrix."""
    mask = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    store(ptr, rows[:, None] * row_stride + columns[None, :] * column_stride, x, mask)


@triton.jit
def upper_pair(pair, tiles):
    """The `pair`-th of the pairs (i, j), i <= j < tiles, of which there are tiles * (tiles + 1) / 2.

    Row i of the pairs and the row that complements it make one line of equal length for all i.
    """
    odd = tiles % 2
    length = tiles + 1 - odd
    line = pair // length
    place = pair % length - 1 + odd
    first = place >= line
    i = tl.where(first, line, tiles - 1 - line + odd)
    j = tl.where(first, place, tiles - 2 - place + odd)
    return i, j


@triton.jit
def add_symmetric(
    out, total, rows, columns, row_stride, column_stride, end, COMPUTE: tl.constexpr, MIRROR: tl.constexpr
):
    """Adds a tile of the upper triangle of a symmetric matrix to `out` [end, end]; MIRROR: and copies it below.

    Of a tile on the diagonal only what lies above is used, so that `out` is symmetric to the bit.
    """
    inside = (rows < end)[:, None] & (columns < end)[None, :]
    upper = inside & (rows[:, None] <= columns[None, :])
    offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    total += load(out, offsets, upper, COMPUTE)
    store(out, offsets, total, upper)
    if MIRROR:
        offsets = rows[:, None] * column_stride + columns[None, :] * row_stride
        store(out, offsets, total, inside & (rows[:, None] < columns[None, :]))


@triton.jit
def add_delta_product(
    total,
    base,
    tensor,
    matrix,
    rows,
    columns,
    base_row,
    base_column,
    tensor_row,
    tensor_column,
    matrix_row,
    matrix_column,
    row_end,
    column_end,
    inner_end,
    OPERAND: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """total + (tensor - base)[rows] @ matrix[:, columns].

    SPLIT: each entry of the matrix is taken as the sum of two operands, the second of which holds what rounding took
    from the first. So 16 bits of a float32 reach the tensor cores, for twice the products.
    """
    COMPUTE: tl.constexpr = "float64" if OPERAND == "float64" else "float32"
    for start in range(0, inner_end, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x = load_tile(tensor, rows, inner, tensor_row, tensor_column, row_end, inner_end, COMPUTE)
        b = load_tile(base, rows, inner, base_row, base_column, row_end, inner_end, COMPUTE)
        delta = operand(x - b, OPERAND)
        m = load_tile(matrix, inner, columns, matrix_row, matrix_column, inner_end, column_end, COMPUTE)
        high = operand(m, OPERAND)
        total = product(delta, high, total, OPERAND)
        if SPLIT:
            total = product(delta, operand(lost(m, high), OPERAND), total, OPERAND)
    return total


@triton.jit
def coordinates(
    tensors,
    row_strides,
    column_strides,
    bases,
    bases_row,
    bases_column,
    rows,
    labels,
    row_end,
    label_end,
    width,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z_m = (tensors[m] - tensors[0])[rows] @ bases[labels]^T for all m >= 1, as a tuple of tiles.

    The tile of the bases and that of the base model are read once for all experts.
    """
    COMPUTE: tl.constexpr = "float64" if OPERAND == "float64" else "float32"
    z = ()
    for _ in tl.static_range(1, len(tensors)):
        z = z + (accumulator(BLOCK_M, BLOCK_N, OPERAND),)  # noqa: RUF005 (the compiler knows only this form)
    for start in range(0, width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K).to(tl.int64)
        s = load_tile(bases, labels, inner, bases_row, bases_column, label_end, width, COMPUTE)
        s = tl.trans(operand(s, OPERAND))
        b = load_tile(tensors[0], rows, inner, row_strides[0], column_strides[0], row_end, width, COMPUTE)
        longer = ()
        for m in tl.static_range(1, len(tensors)):
            x = load_tile(tensors[m], rows, inner, row_strides[m], column_strides[m], row_end, width, COMPUTE)
            longer = longer + (product(operand(x - b, OPERAND), s, z[m - 1], OPERAND),)  # noqa: RUF005
        z = longer
    return z
