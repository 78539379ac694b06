"""inner_products in Triton; the formula and its order of summation are in ``seme/ops/inner_products.py``.

One launch per pair of tensors, so that n = 2 reads each input once. A program sums some blocks of 8192 elements at a
time: 8 threads take a row of 64 elements of a block, each 8 of its lanes, in accesses of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from seme.native import BLOCK

from .numeric import fold_lanes, load
from .tables import Flat, flat

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def inner_products_kernel(x, y, out, n, i, j, count, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The entries (i, i), (i, j), (j, i) and (j, j) of each block's count x count matrix, for x = i and y = j."""
    first = tl.program_id(0).to(tl.int64) * GROUP
    block = first + tl.arange(0, GROUP)
    lanes = block[:, None] * BLOCK + tl.arange(0, 64)[None, :]
    xx = tl.zeros([GROUP, 64], dtype=tl.float64)
    xy = tl.zeros([GROUP, 64], dtype=tl.float64)
    yy = tl.zeros([GROUP, 64], dtype=tl.float64)
    # Unrolled so that several rows are on their way at once; the sums stay in order.
    for row in tl.range(0, tl.minimum(BLOCK // 64, tl.cdiv(n - first * BLOCK, 64)), loop_unroll_factor=4):
        offsets = lanes + row * 64
        mask = offsets < n
        a = load(x, offsets, mask, COMPUTE).to(tl.float64)
        b = load(y, offsets, mask, COMPUTE).to(tl.float64)
        xx += a * a
        xy += a * b
        yy += b * b
    matrix = out + block * count * count
    there = block * BLOCK < n
    cross = fold_lanes(xy, GROUP)
    tl.store(matrix + i * count + i, fold_lanes(xx, GROUP), mask=there)
    tl.store(matrix + i * count + j, cross, mask=there)
    tl.store(matrix + j * count + i, cross, mask=there)
    tl.store(matrix + j * count + j, fold_lanes(yy, GROUP), mask=there)


def launch(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, *, compute_dtype: DType, shape: Flat | None = None
) -> None:
    """Run on flat, contiguous tensors; writes `out`, float64 [blocks, n, n] seen as one axis."""
    n, count = tensors[0].numel(), len(tensors)
    if n == 0:
        return
    shape = shape or flat("inner_products", out.device)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)] or [(0, 0)]
    for i, j in pairs:
        inner_products_kernel[(triton.cdiv(n, shape.elements),)](
            tensors[i], tensors[j], out, n, i, j, count,
            COMPUTE=compute_dtype.name, BLOCK=BLOCK, GROUP=shape.elements // BLOCK, **shape.options(),
        )  # fmt: skip
