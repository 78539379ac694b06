"""semantic_energy in Triton; the formula is in ``seme/ops/semantic_energy.py``.

A program computes the tile E = (S M)[labels, columns], multiplies it by S[labels, columns] in registers and sums its
rows. So a column tile leaves one number per label, and these are added in the order of the columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import accumulator, operand, product
from .tables import Tiles, operand_of, precise, tiles
from .tiles import indices, load_tile, own_tile

if TYPE_CHECKING:
    import torch


@triton.jit
def semantic_energy_kernel(
    bases,
    moment,
    parts,
    labels_end,
    width,
    bases_row,
    bases_column,
    moment_row,
    moment_column,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """parts[j, labels] = sum over the columns of tile j of (S M) * S."""
    COMPUTE: tl.constexpr = "float64" if OPERAND == "float64" else "float32"
    i, j = own_tile(labels_end, width, BLOCK_M, BLOCK_N)
    labels, columns = indices(i, BLOCK_M), indices(j, BLOCK_N)
    total = accumulator(BLOCK_M, BLOCK_N, OPERAND)
    for start in range(0, width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K).to(tl.int64)
        s = load_tile(bases, labels, inner, bases_row, bases_column, labels_end, width, COMPUTE)
        m = load_tile(moment, inner, columns, moment_row, moment_column, width, width, COMPUTE)
        total = product(operand(s, OPERAND), operand(m, OPERAND), total, OPERAND)
    s = load_tile(bases, labels, columns, bases_row, bases_column, labels_end, width, COMPUTE)
    tl.store(parts + j.to(tl.int64) * labels_end + labels, tl.sum(total * s, axis=1), mask=labels < labels_end)


def launch(
    bases: torch.Tensor,
    moment: torch.Tensor,
    out: torch.Tensor,
    *,
    precision: str = "ieee",
    shape: Tiles | None = None,
) -> None:
    """Writes s_i^T M s_i for every row s_i of `bases` to `out`, [v] in float32 (float64).

    `precision` "tf32x3" gives float32 products to the tensor cores in three parts.
    """
    labels, width = bases.shape
    if labels == 0 or width == 0:
        out.zero_()
        return
    chosen = precise(operand_of([bases, moment]), precision)
    shape = shape or tiles(chosen, out.device)
    across = triton.cdiv(width, shape.n)
    parts = out.new_empty(across, labels)
    semantic_energy_kernel[(triton.cdiv(labels, shape.m) * across,)](
        bases, moment, parts, labels, width, *bases.stride(), *moment.stride(), OPERAND=chosen, **shape.options()
    )
    out.copy_(parts.sum(0))
