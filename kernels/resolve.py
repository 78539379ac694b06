"""resolve in Triton; the formula is in ``seme/ops/resolve.py``.

Selection: a program keeps the k best labels of a block of vectors over one range of label tiles, so the scores are
never stored; the ranges' lists are merged by ``torch.topk``. A candidate is one integer, the bits of the magnitude of
its score above those of the complement of its label: integers of this kind are distinct, and their order is that of
the labels, ties included.

Erasure: a program per vector reads its k bases twice, for their Gram matrix and for the residual. A Gram matrix has
the square of the condition of its bases, so it is formed and inverted in float64, which has the digits for that.
Batched library calls would need the k bases of every vector in memory, 4 N k d bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import DOT_TAKES_FLOAT64, FLOAT64_TERMS, accumulator, load, magnitude_key, operand, product, store
from .tables import Tiles, operand_of, processors, table, tiles
from .tiles import indices, load_tile

if TYPE_CHECKING:
    import torch

LABEL_BITS = tl.constexpr(0xFFFFFFFF)
LEAST = tl.constexpr(-(2**63))
MOST = tl.constexpr(2**63 - 1)


@triton.jit
def resolve_select_kernel(
    vectors,
    bases,
    lists,
    height,
    labels_end,
    width,
    ranges,
    k,
    vectors_row,
    vectors_column,
    bases_row,
    bases_column,
    OPERAND: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """lists[rows, range]: the k best candidates of a range of labels, in no order, int64 [height, ranges, K].

    What is negative is none.
    """
    COMPUTE: tl.constexpr = "float64" if OPERAND == "float64" else "float32"
    rows = indices(tl.program_id(0), BLOCK_M)
    chosen = tl.program_id(1)
    count = tl.cdiv(labels_end, BLOCK_N)
    per_range = tl.cdiv(count, ranges)
    # Numbers below all candidates, each another one; the slots beyond k are never given away.
    slots = tl.arange(0, K).to(tl.int64)
    top = tl.full([BLOCK_M, K], 0, tl.int64) + tl.where(slots < k, -1 - slots, MOST)[None, :]
    for tile in range(chosen * per_range, tl.minimum((chosen + 1) * per_range, count)):
        labels = indices(tile, BLOCK_N)
        score = accumulator(BLOCK_M, BLOCK_N, OPERAND)
        for start in range(0, width, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K).to(tl.int64)
            h = load_tile(vectors, rows, inner, vectors_row, vectors_column, height, width, COMPUTE)
            s = load_tile(bases, labels, inner, bases_row, bases_column, labels_end, width, COMPUTE)
            score = product(operand(h, OPERAND), tl.trans(operand(s, OPERAND)), score, OPERAND)
        key = magnitude_key(score.to(tl.float32), "float32").to(tl.int64)
        candidate = (key << 32) | (labels ^ LABEL_BITS)[None, :]
        candidate = tl.where((labels < labels_end)[None, :], candidate, LEAST)
        # The best candidate takes the place of the worst in the list, as long as it is better in any row. After the
        # first tiles that is rare.
        best = tl.max(candidate, axis=1)
        worst = tl.min(top, axis=1)
        while tl.max((best > worst).to(tl.int32), axis=0) > 0:
            given = (top == worst[:, None]) & (best > worst)[:, None]
            top = tl.where(given, best[:, None], top)
            candidate = tl.where(candidate == best[:, None], LEAST, candidate)
            best = tl.max(candidate, axis=1)
            worst = tl.min(top, axis=1)
    places = (rows[:, None] * ranges + chosen) * K + slots[None, :]
    tl.store(lists + places, tl.where((slots < k)[None, :], top, LEAST), mask=(rows < height)[:, None])


@triton.jit
def load_atoms(bases, label, used, inner, width, bases_row, bases_column):
    """The entries `inner` of the bases of a vector's labels, in float64."""
    places = label[:, None] * bases_row + inner[None, :] * bases_column
    return load(bases, places, used[:, None] & (inner < width)[None, :], "float64")


@triton.jit
def resolve_erase_kernel(
    vectors,
    bases,
    labels,
    reals,
    coefficients,
    residual,
    width,
    k,
    vectors_row,
    vectors_column,
    bases_row,
    bases_column,
    coefficients_row,
    coefficients_column,
    residual_row,
    residual_column,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Least squares of one vector on its k labels, through their Gram matrix, and what is left of the vector.

    reals: the square of the distance of a basis to the span of those before it, relative to its squared norm, above
    which it counts as independent; float64.
    """
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, K)
    used = slots < k
    label = tl.load(labels + row * k + slots, mask=used, other=0)
    gram = accumulator(K, K, "float64")
    right = tl.sum(gram, axis=1)
    for start in range(0, width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K).to(tl.int64)
        s = load_atoms(bases, label, used, inner, width, bases_row, bases_column)
        h = load(vectors, row * vectors_row + inner * vectors_column, inner < width, "float64")
        gram = product(s, tl.trans(s), gram, "float64")
        right += tl.sum(s * h[None, :], axis=1)

    # Elimination above and below the diagonal, in the order of the labels, so that the right-hand side becomes the
    # solution. A label that depends on those before it is passed over.
    least = tl.load(reals) * tl.sum(tl.where(slots[:, None] == slots[None, :], gram, 0.0), axis=0)
    kept = slots < 0
    for j in range(0, k):
        here = slots == j
        line = tl.sum(tl.where(here[:, None], gram, 0.0), axis=0)
        own = here & (line > least)
        pivot = tl.sum(tl.where(own, line, 0.0), axis=0)
        independent = pivot > 0
        divisor = tl.where(independent, pivot, 1.0)
        line = line / divisor
        share = tl.sum(tl.where(here, right, 0.0), axis=0) / divisor
        column = tl.sum(tl.where(here[None, :], gram, 0.0), axis=1)
        column = tl.where(independent, column, 0.0)
        gram = tl.where(own[:, None], line[None, :], gram - column[:, None] * line[None, :])
        right = tl.where(own, share, right - column * share)
        kept = kept | own
    solution = tl.where(kept, right, 0.0)
    store(coefficients, row * coefficients_row + slots * coefficients_column, solution, used)

    for start in range(0, width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K).to(tl.int64)
        s = load_atoms(bases, label, used, inner, width, bases_row, bases_column)
        h = load(vectors, row * vectors_row + inner * vectors_column, inner < width, "float64")
        rest = h - tl.sum(s * solution[:, None], axis=0)
        store(residual, row * residual_row + inner * residual_column, rest, inner < width)


def nearest(
    vectors: torch.Tensor, bases: torch.Tensor, k: int, shape: Tiles | None = None, ranges: int | None = None
) -> torch.Tensor:
    """The labels [N, k] of the nearest bases, int64, by falling ``|cosine|``.

    `ranges`: how many parts the labels are cut into; by default as many as fill the GPU.
    """
    import torch

    (height, width), vocabulary = vectors.shape, bases.shape[0]
    device = vectors.device
    chosen = operand_of([vectors], [bases])
    kept = max(2, triton.next_power_of_2(k))
    shape = shape or tiles(chosen, device, results=2)  # the candidates lie beside the scores
    down = triton.cdiv(height, shape.m)
    ranges = ranges or max(1, min(triton.cdiv(vocabulary, shape.n), 2 * processors(device) // down))
    lists = vectors.new_empty(height, ranges, kept, dtype=torch.int64)
    resolve_select_kernel[(down, ranges)](
        vectors, bases, lists, height, vocabulary, width, ranges, k, *vectors.stride(), *bases.stride(),
        OPERAND=chosen, K=kept, **shape.options(),
    )  # fmt: skip
    return lists.view(height, -1).topk(k).values & LABEL_BITS.value ^ LABEL_BITS.value


def launch(
    vectors: torch.Tensor,
    bases: torch.Tensor,
    labels: torch.Tensor,
    coefficients: torch.Tensor,
    residual: torch.Tensor,
    *,
    k: int,
    dependent: float,
    shape: Tiles | None = None,
    ranges: int | None = None,
) -> None:
    """Writes `labels` int64 [N, k], `coefficients` [N, k] and `residual` [N, d]."""
    import torch

    height, width = vectors.shape
    if height == 0:
        return
    found = nearest(vectors, bases, k, shape, ranges)
    labels.copy_(found)
    side = max(16, triton.next_power_of_2(k))
    depth = 32 if DOT_TAKES_FLOAT64.value else FLOAT64_TERMS // side**2
    resolve_erase_kernel[(height,)](
        vectors, bases, found, table([dependent], torch.float64, vectors.device), coefficients, residual, width, k,
        *vectors.stride(), *bases.stride(), *coefficients.stride(), *residual.stride(),
        K=side, BLOCK_K=depth, num_warps=4 if side <= 32 else 8, enable_fp_fusion=False,
    )  # fmt: skip
