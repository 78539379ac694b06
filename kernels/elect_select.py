"""elect_select in Triton; bins, columns and energies are described in ``seme/ops/elect_select.py``.

A program forms the coordinates z_m of one row block in one label tile for all experts, takes their variance, and
counts. The energies are sums of z_m^2 in fixed point: integer additions give the same sum in any order, so the
result does not depend on which program comes first. One unit is at most 2^-60 of what a sum can reach,
||T_m||_F^2 ||S||_F^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import divide, magnitude_key
from .tables import Tiles, operand_of, strides, table, tiles
from .tiles import coordinates, indices, load_tile, own_tile

if TYPE_CHECKING:
    import torch

BINS = tl.constexpr(65536)
ENERGIES = tl.constexpr(65537)  # the bins, and what lies beyond the window


@triton.jit
def variance_key(z):
    """The key of the variance over the experts, int32: the bits of the float32, which grow with it."""
    mean = z[0]
    for m in tl.static_range(1, len(z)):
        mean += z[m]
    count = tl.full([1, 1], len(z), mean.dtype)
    mean = divide(mean, count)
    squares = (z[0] - mean) * (z[0] - mean)
    for m in tl.static_range(1, len(z)):
        squares += (z[m] - mean) * (z[m] - mean)
    return magnitude_key(divide(squares, count).to(tl.float32), "float32")


@triton.jit
def total_of(x):
    """The sum of all entries of a tile, which is an integer."""
    return tl.sum(tl.sum(x.to(tl.int64), axis=1), axis=0)


@triton.jit
def elect_select_kernel(
    tensors,
    bases,
    window,
    units,
    counts,
    energies,
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
    """tensors: the base, then the experts. window: lowest and shift, int64. units: 1 / unit of each expert, float64.

    energies: int64 [n, 65537], in units.
    """
    i, j = own_tile(height, labels_end, BLOCK_M, BLOCK_N)
    rows, labels = indices(i, BLOCK_M), indices(j, BLOCK_N)
    z = coordinates(
        tensors, row_strides, column_strides, bases, bases_row, bases_column, rows, labels, height, labels_end, width,
        OPERAND, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    key = variance_key(z).to(tl.int64)
    lowest = tl.load(window)
    shift = tl.load(window + 1)
    there = (rows < height)[:, None] & (labels < labels_end)[None, :]
    counted = there & (key >= lowest)
    above = tl.where(counted, key - lowest, 0)
    bin = above >> shift
    inside = counted & (bin < BINS)
    passed = counted & (bin >= BINS)
    # Of a single expert, or of equal ones, every variance is 0: one addition for all of them, not one each.
    zero = inside & (key == 0)
    spread = inside & (key != 0)
    zeros, beyond = total_of(zero), total_of(passed)
    mixed = total_of(inside & (above != (bin << shift)))
    tl.atomic_add(counts + bin, tl.full([BLOCK_M, BLOCK_N], 1, tl.int64), mask=spread, sem="relaxed")
    tl.atomic_add(counts, zeros, mask=zeros > 0, sem="relaxed")
    tl.atomic_add(counts + BINS, beyond, mask=beyond > 0, sem="relaxed")
    tl.atomic_add(counts + BINS + 1, mixed, mask=mixed > 0, sem="relaxed")
    for m in tl.static_range(len(z)):
        square = z[m].to(tl.float64) * z[m].to(tl.float64)
        energy = (square * tl.load(units + m) + 0.5).to(tl.int64)
        entry = energies + m * ENERGIES
        tl.atomic_add(entry + bin, energy, mask=spread, sem="relaxed")
        tl.atomic_add(entry, total_of(tl.where(zero, energy, 0)), mask=zeros > 0, sem="relaxed")
        tl.atomic_add(entry + BINS, total_of(tl.where(passed, energy, 0)), mask=beyond > 0, sem="relaxed")


@triton.jit
def squared_norm_kernel(
    base,
    tensor,
    parts,
    height,
    width,
    base_row,
    base_column,
    tensor_row,
    tensor_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """parts[rows] = the squared norms of some rows of tensor - base, float64."""
    rows = indices(tl.program_id(0), BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float64)
    for start in range(0, width, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N).to(tl.int64)
        t = load_tile(tensor, rows, columns, tensor_row, tensor_column, height, width, "float64")
        t -= load_tile(base, rows, columns, base_row, base_column, height, width, "float64")
        total += t * t
    tl.store(parts + rows, tl.sum(total, axis=1), mask=rows < height)


def launch(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bases: torch.Tensor,
    counts: torch.Tensor,
    energies: torch.Tensor,
    *,
    lowest: int,
    shift: int,
    shape: Tiles | None = None,
) -> None:
    """Adds to `counts`, int64 [65538], and `energies`, float64 [n, 65537]."""
    import torch

    (height, width), labels = base.shape, bases.shape[0]
    if height == 0 or labels == 0:
        return
    every = (base, *tensors)
    chosen = operand_of(every, [bases])
    shape = shape or tiles(chosen, counts.device, len(tensors))
    unit = units(base, tensors, bases)
    added = counts.new_zeros(counts.shape)
    fixed = counts.new_zeros(energies.shape)
    elect_select_kernel[(triton.cdiv(height, shape.m) * triton.cdiv(labels, shape.n),)](
        every, bases, table([lowest, shift], torch.int64, counts.device), 1 / unit, added, fixed,
        height, labels, width, *strides(every), *bases.stride(), OPERAND=chosen, **shape.options(),
    )  # fmt: skip
    counts += added
    energies += fixed * unit[:, None]


def units(base: torch.Tensor, tensors: Sequence[torch.Tensor], bases: torch.Tensor) -> torch.Tensor:
    """The unit of each expert's energies, float64 [n]: a power of two, so that what is in units is exact.

    A sum of z_mi^2 over anything is at most ||T_m||_F^2 ||S||_F^2. NaN if that is not finite, so are the energies.
    """
    import torch

    height, width = base.shape
    norms = base.new_empty(len(tensors), height, dtype=torch.float64)
    for tensor, parts in zip(tensors, norms):
        squared_norm_kernel[(triton.cdiv(height, 8),)](
            base, tensor, parts, height, width, *base.stride(), *tensor.stride(),
            BLOCK_M=8, BLOCK_N=256, enable_fp_fusion=False,
        )  # fmt: skip
    reach = norms.sum(1) * torch.linalg.vector_norm(bases, dtype=torch.float64) ** 2
    unit = torch.where(reach > 0, torch.exp2(reach.log2().ceil() - 61), 1.0)
    return torch.where(reach.isfinite(), unit, torch.nan)
