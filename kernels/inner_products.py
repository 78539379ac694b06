"""inner_products in Triton; the formula and its order of summation are in ``seme/ops/inner_products.py``.

One launch per pair of tensors, so that n = 2 reads each input once; a program sums one block of 8192 elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from seme.native import BLOCK

from .numeric import fold_lanes, load

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def inner_products_kernel(x, y, out, n, i, j, count, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """The entries (i, i), (i, j), (j, i) and (j, j) of the block's count x count matrix, for x = i and y = j."""
    block = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, 64)
    xx = tl.zeros([64], dtype=tl.float64)
    xy = tl.zeros([64], dtype=tl.float64)
    yy = tl.zeros([64], dtype=tl.float64)
    # Unrolled so that several rows are on their way at once; the sums stay in order.
    for row in tl.range(0, tl.minimum(BLOCK // 64, tl.cdiv(n - block * BLOCK, 64)), loop_unroll_factor=8):
        offsets = block * BLOCK + row * 64 + lanes
        mask = offsets < n
        a = load(x, offsets, mask, COMPUTE).to(tl.float64)
        b = load(y, offsets, mask, COMPUTE).to(tl.float64)
        xx += a * a
        xy += a * b
        yy += b * b
    matrix = out + block * count * count
    cross = fold_lanes(xy)
    tl.store(matrix + i * count + i, fold_lanes(xx))
    tl.store(matrix + i * count + j, cross)
    tl.store(matrix + j * count + i, cross)
    tl.store(matrix + j * count + j, fold_lanes(yy))


def launch(tensors: Sequence[torch.Tensor], out: torch.Tensor, *, compute_dtype: DType) -> None:
    """Run on flat, contiguous tensors; writes `out`, float64 [blocks, n, n] seen as one axis."""
    n, count = tensors[0].numel(), len(tensors)
    if n == 0:
        return
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)] or [(0, 0)]
    for i, j in pairs:
        inner_products_kernel[(triton.cdiv(n, BLOCK),)](
            tensors[i], tensors[j], out, n, i, j, count,
            COMPUTE=compute_dtype.name, BLOCK=BLOCK, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
