"""project_erase in Triton; the formula is in ``seme/ops/project_erase.py``.

One kernel for all experts: a tile of the result sums the products of every expert in the same registers, then the
base is added and the result rounded once. Neither a task vector nor an expert's share of it is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import accumulator, held
from .tables import Tiles, operand_of, strides, table, tiles
from .tiles import add_delta_product, indices, load_tile, own_tile, store_tile

if TYPE_CHECKING:
    import torch


@triton.jit
def project_erase_kernel(
    tensors,
    projections,
    reals,
    out,
    height,
    width,
    row_strides,
    column_strides,
    projection_rows,
    projection_columns,
    out_row,
    out_column,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of `out` [height, width]. tensors: the base, then the experts. reals: the scale, in float64."""
    i, j = own_tile(height, width, BLOCK_M, BLOCK_N)
    rows, columns = indices(i, BLOCK_M), indices(j, BLOCK_N)
    total = accumulator(BLOCK_M, BLOCK_N, OPERAND)
    for m in tl.static_range(1, len(tensors)):
        total = add_delta_product(
            total, tensors[0], tensors[m], projections[m - 1], rows, columns,
            row_strides[0], column_strides[0], row_strides[m], column_strides[m],
            projection_rows[m - 1], projection_columns[m - 1], height, width, width, OPERAND, False, BLOCK_K,
        )  # fmt: skip
    COMPUTE: tl.constexpr = "float64" if OPERAND == "float64" else "float32"
    base = load_tile(tensors[0], rows, columns, row_strides[0], column_strides[0], height, width, COMPUTE)
    merged = base + held(tl.load(reals), COMPUTE) * total
    store_tile(out, merged, rows, columns, out_row, out_column, height, width)


def launch(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    projections: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    scale: float,
    shape: Tiles | None = None,
) -> None:
    """Writes base + scale * sum_m (tensors[m] - base) @ projections[m] to `out`, which none of the others overlaps."""
    import torch

    height, width = base.shape
    if height == 0 or width == 0:
        return
    every = (base, *tensors)
    chosen = operand_of(every, projections)
    shape = shape or tiles(chosen, out.device)
    project_erase_kernel[(triton.cdiv(height, shape.m) * triton.cdiv(width, shape.n),)](
        every, tuple(projections), table([scale], torch.float64, out.device), out, height, width,
        *strides(every), *strides(projections), *out.stride(), OPERAND=chosen, **shape.options(),
    )  # fmt: skip
