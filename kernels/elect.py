"""elect in Triton; the formula is in ``seme/ops/elect.py``.

Two kernels for a few rows at a time. The first forms the coordinates z_m of a row block in a label tile for all
experts, elects, and stores the one number that is left per position, the combined coordinate c. The second is the
product c B with the base added and one rounding. What is stored is c for those rows, :data:`WORKSPACE` bytes at most,
in the precision that the product takes; never rows x labels of anything for the whole matrix.

One kernel with a sum for every output column, as attention has it, would not do: a row block's d sums (d to 8192) do
not fit into registers, and with fewer columns per program z would be formed once per program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .elect_select import variance_key
from .numeric import accumulator, divide, held, key_bound, operand, product
from .tables import Tiles, operand_of, strides, table, tiles
from .tiles import coordinates, indices, load_tile, own_tile, store_tile

if TYPE_CHECKING:
    import torch

WORKSPACE = 128 << 20
"""Bytes for the combined coordinates; at least one row block of them is held, whatever the vocabulary."""


@triton.jit
def elect_combine_kernel(
    tensors,
    bases,
    thresholds,
    etas,
    combined,
    height,
    labels_end,
    width,
    row_strides,
    column_strides,
    bases_row,
    bases_column,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """combined [height, labels_end]: sum_m eta_m z_m / sum_m eta_m over the experts with the elected sign.

    tensors: the base, then the experts. thresholds: one key, int64. etas: float64 [n].
    """
    COMPUTE: tl.constexpr = "float64" if OPERAND == "float64" else "float32"
    i, j = own_tile(height, labels_end, BLOCK_M, BLOCK_N)
    rows, labels = indices(i, BLOCK_M), indices(j, BLOCK_N)
    z = coordinates(
        tensors, row_strides, column_strides, bases, bases_row, bases_column, rows, labels, height, labels_end, width,
        OPERAND, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    keep = variance_key(z) >= key_bound(tl.load(thresholds), "float32")
    total = z[0]
    for m in tl.static_range(1, len(z)):
        total += z[m]
    positive = total >= 0
    above = tl.zeros_like(total)
    below = tl.zeros_like(total)
    for m in tl.static_range(len(z)):
        agrees = tl.where(positive, z[m] > 0, z[m] < 0)
        eta = tl.where(agrees, held(tl.load(etas + m), COMPUTE), 0.0)
        above += eta * z[m]
        below += eta
    keep = keep & (below != 0)
    c = tl.where(keep, divide(above, tl.where(keep, below, 1.0)), 0.0)
    store_tile(combined, c, rows, labels, labels_end, 1, height, labels_end)


@triton.jit
def elect_recompose_kernel(
    base,
    combined,
    dual,
    reals,
    out,
    height,
    labels_end,
    width,
    base_row,
    base_column,
    dual_row,
    dual_column,
    out_row,
    out_column,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`out` = base + scale * combined @ dual. reals: the scale, in float64."""
    COMPUTE: tl.constexpr = "float64" if OPERAND == "float64" else "float32"
    i, j = own_tile(height, width, BLOCK_M, BLOCK_N)
    rows, columns = indices(i, BLOCK_M), indices(j, BLOCK_N)
    total = accumulator(BLOCK_M, BLOCK_N, OPERAND)
    for start in range(0, labels_end, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K).to(tl.int64)
        c = load_tile(combined, rows, inner, labels_end, 1, height, labels_end, COMPUTE)
        d = load_tile(dual, inner, columns, dual_row, dual_column, labels_end, width, COMPUTE)
        total = product(operand(c, OPERAND), operand(d, OPERAND), total, OPERAND)
    b = load_tile(base, rows, columns, base_row, base_column, height, width, COMPUTE)
    merged = b + held(tl.load(reals), COMPUTE) * total
    store_tile(out, merged, rows, columns, out_row, out_column, height, width)


def launch(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bases: torch.Tensor,
    dual: torch.Tensor,
    out: torch.Tensor,
    *,
    threshold: int,
    etas: Sequence[float],
    scale: float,
    shape: Tiles | None = None,
    workspace: int = WORKSPACE,
) -> None:
    """Writes `out`. `shape` is that of the first kernel, whose coordinates must be those of ``elect_select``."""
    import torch

    (height, width), labels = base.shape, bases.shape[0]
    if height == 0 or width == 0:
        return
    device = out.device
    chosen = operand_of((base, *tensors), (bases, dual))
    plain = tiles(chosen, device)
    shape = shape or tiles(chosen, device, len(tensors))
    stored = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(chosen, torch.float32)
    lines = max(1, workspace // (plain.m * max(labels, 1) * stored.itemsize)) * plain.m
    combined = out.new_empty(min(lines, height), labels, dtype=stored)
    thresholds = table([threshold], torch.int64, device)
    shares, reals = table(etas, torch.float64, device), table([scale], torch.float64, device)
    for begin in range(0, height, lines):
        every = tuple(t[begin : begin + lines] for t in (base, *tensors))
        b, o = every[0], out[begin : begin + lines]
        down = b.shape[0]
        if labels:
            elect_combine_kernel[(triton.cdiv(down, shape.m) * triton.cdiv(labels, shape.n),)](
                every, bases, thresholds, shares, combined, down, labels, width, *strides(every), *bases.stride(),
                OPERAND=chosen, **shape.options(),
            )  # fmt: skip
        elect_recompose_kernel[(triton.cdiv(down, plain.m) * triton.cdiv(width, plain.n),)](
            b, combined, dual, reals, o, down, labels, width, *b.stride(), *dual.stride(), *o.stride(),
            OPERAND=chosen, **plain.options(),
        )  # fmt: skip
