"""delta_project in Triton; the formula is in ``seme/ops/delta_project.py``.

A matrix product whose left operand is a difference formed in registers. The matrix keeps 16 bits of its entries even
where the operands are bfloat16: what a product with it gives is solved against, and the solve would amplify the
rounding of the matrix (not that of T, which acts as if the weights had been rounded).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import accumulator
from .tables import Tiles, operand_of, tiles
from .tiles import add_delta_product, indices, load_tile, own_tile, store_tile

if TYPE_CHECKING:
    import torch


@triton.jit
def delta_project_kernel(
    base,
    tensor,
    matrix,
    out,
    height,
    width,
    base_row,
    base_column,
    tensor_row,
    tensor_column,
    matrix_row,
    matrix_column,
    out_row,
    out_column,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of `out` [height, width] += (tensor - base) @ matrix."""
    i, j = own_tile(height, width, BLOCK_M, BLOCK_N)
    rows, columns = indices(i, BLOCK_M), indices(j, BLOCK_N)
    total = add_delta_product(
        accumulator(BLOCK_M, BLOCK_N, OPERAND), base, tensor, matrix, rows, columns,
        base_row, base_column, tensor_row, tensor_column, matrix_row, matrix_column, height, width, width,
        OPERAND, OPERAND == "bfloat16", BLOCK_K,
    )  # fmt: skip
    COMPUTE: tl.constexpr = "float64" if OPERAND == "float64" else "float32"
    total += load_tile(out, rows, columns, out_row, out_column, height, width, COMPUTE)
    store_tile(out, total, rows, columns, out_row, out_column, height, width)


def launch(
    base: torch.Tensor, tensor: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, *, shape: Tiles | None = None
) -> None:
    """Adds (tensor - base) @ matrix to `out`, [r, in] in float32 (float64)."""
    height, width = base.shape
    if height == 0 or width == 0:
        return
    chosen = operand_of([base, tensor], [matrix])
    shape = shape or tiles(chosen, out.device)
    delta_project_kernel[(triton.cdiv(height, shape.m) * triton.cdiv(width, shape.n),)](
        base, tensor, matrix, out, height, width, *base.stride(), *tensor.stride(), *matrix.stride(), *out.stride(),
        OPERAND=chosen, **shape.options(),
    )  # fmt: skip
