"""weighted_gram in Triton; the formula is in ``seme/ops/weighted_gram.py``.

Tiles of the upper triangle, as in ``delta_gram``. Only the rows with a weight are read: they are listed first, and
the kernel reads their number from the device, so that nobody waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import accumulator, load, operand, product
from .tables import Tiles, operand_of, precise, tiles
from .tiles import add_symmetric, indices, upper_pair

if TYPE_CHECKING:
    import torch


@triton.jit
def weighted_gram_kernel(
    bases,
    weights,
    listed,
    count,
    out,
    width,
    bases_row,
    bases_column,
    out_row,
    out_column,
    OPERAND: tl.constexpr,
    MIRROR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tile (i, j), i <= j, of `out` [width, width] += sum over the first `count` rows that are `listed`."""
    COMPUTE: tl.constexpr = "float64" if OPERAND == "float64" else "float32"
    i, j = upper_pair(tl.program_id(0), tl.cdiv(width, BLOCK_N))
    left, right = indices(i, BLOCK_M), indices(j, BLOCK_N)
    end = tl.load(count)
    total = accumulator(BLOCK_M, BLOCK_N, OPERAND)
    for start in range(0, end, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K).to(tl.int64)
        there = place < end
        rows = tl.load(listed + place, mask=there, other=0)
        weight = load(weights, rows, there, COMPUTE)
        lines = rows[:, None] * bases_row
        s = load(bases, lines + left[None, :] * bases_column, there[:, None] & (left < width)[None, :], COMPUTE)
        s_left = tl.trans(operand(s * weight[:, None], OPERAND))
        s = load(bases, lines + right[None, :] * bases_column, there[:, None] & (right < width)[None, :], COMPUTE)
        total = product(s_left, operand(s, OPERAND), total, OPERAND)
    add_symmetric(out, total, left, right, out_row, out_column, width, COMPUTE, MIRROR)


def launch(
    bases: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    *,
    mirror: bool,
    precision: str = "ieee",
    shape: Tiles | None = None,
) -> None:
    """Adds bases^T diag(weights) bases to `out`, [d, d] in float32 (float64); `shape` is square.

    Without `mirror` what lies below the diagonal stays as it is. `precision` "tf32x3" gives float32 products to the
    tensor cores in three parts. The bases are not rounded, whatever their dtype: a weighted row would be.
    """
    labels, width = bases.shape
    if labels == 0 or width == 0:
        return
    chosen = precise(operand_of([out]), precision)
    shape = shape or tiles(chosen, out.device)
    listed = (weights == 0).int().argsort(stable=True)
    count = weights.count_nonzero()
    across = triton.cdiv(width, shape.n)
    weighted_gram_kernel[(across * (across + 1) // 2,)](
        bases, weights.contiguous(), listed, count, out, width, *bases.stride(), *out.stride(),
        OPERAND=chosen, MIRROR=mirror, **shape.options(),
    )  # fmt: skip
