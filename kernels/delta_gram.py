"""delta_gram in Triton; the formula is in ``seme/ops/delta_gram.py``.

A program computes one tile of the upper triangle of T^T T and writes it to its place and to its mirror image. The two
tiles of T that meet are differences formed in registers, so T is never stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import accumulator, operand, product
from .tables import Tiles, operand_of, tiles
from .tiles import add_symmetric, indices, load_tile, upper_pair

if TYPE_CHECKING:
    import torch


@triton.jit
def delta_gram_kernel(
    base,
    tensor,
    out,
    height,
    width,
    base_row,
    base_column,
    tensor_row,
    tensor_column,
    out_row,
    out_column,
    OPERAND: tl.constexpr,
    MIRROR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tile (i, j), i <= j, of `out` [width, width] += T^T T, for T = tensor - base, [height, width]."""
    COMPUTE: tl.constexpr = "float64" if OPERAND == "float64" else "float32"
    i, j = upper_pair(tl.program_id(0), tl.cdiv(width, BLOCK_N))
    left, right = indices(i, BLOCK_M), indices(j, BLOCK_N)
    total = accumulator(BLOCK_M, BLOCK_N, OPERAND)
    for start in range(0, height, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x = load_tile(tensor, rows, left, tensor_row, tensor_column, height, width, COMPUTE)
        b = load_tile(base, rows, left, base_row, base_column, height, width, COMPUTE)
        t_left = tl.trans(operand(x - b, OPERAND))
        x = load_tile(tensor, rows, right, tensor_row, tensor_column, height, width, COMPUTE)
        b = load_tile(base, rows, right, base_row, base_column, height, width, COMPUTE)
        total = product(t_left, operand(x - b, OPERAND), total, OPERAND)
    add_symmetric(out, total, left, right, out_row, out_column, width, COMPUTE, MIRROR)


def launch(
    base: torch.Tensor, tensor: torch.Tensor, out: torch.Tensor, *, mirror: bool, shape: Tiles | None = None
) -> None:
    """Adds (tensor - base)^T (tensor - base) to `out`, [in, in] in float32 (float64); `shape` is square.

    Without `mirror` what lies below the diagonal stays as it is.
    """
    height, width = base.shape
    if height == 0 or width == 0:
        return
    chosen = operand_of([base, tensor])
    shape = shape or tiles(chosen, out.device)
    across = triton.cdiv(width, shape.n)
    delta_gram_kernel[(across * (across + 1) // 2,)](
        base, tensor, out, height, width, *base.stride(), *tensor.stride(), *out.stride(),
        OPERAND=chosen, MIRROR=mirror, **shape.options(),
    )  # fmt: skip
