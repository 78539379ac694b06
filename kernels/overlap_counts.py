"""overlap_counts in Triton: one pass over the base and the inputs, one addition per program and count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import held
from .ram import changes
from .tables import Flat, flat, table
from .variance import load_deltas

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def overlap_counts_kernel(tensors, reals, counts, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """tensors: the base, then the others. reals: epsilon, in float64. counts: [models, 2]."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    base, deltas = load_deltas(tensors, offsets, mask, COMPUTE)
    epsilon = held(tl.load(reals), COMPUTE)
    count = tl.zeros_like(base)
    for i in tl.static_range(len(deltas)):
        count += changes(deltas[i], epsilon)
    for i in tl.static_range(len(deltas)):
        changed = mask & (changes(deltas[i], epsilon) != 0)
        shared = tl.sum((changed & (count > 1)).to(tl.int64), axis=0)
        alone = tl.sum((changed & (count <= 1)).to(tl.int64), axis=0)
        tl.atomic_add(counts + 2 * i, shared, mask=shared > 0, sem="relaxed")
        tl.atomic_add(counts + 2 * i + 1, alone, mask=alone > 0, sem="relaxed")


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    epsilon: float,
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; adds to `out`, int64 [n, 2] seen as one axis."""
    import torch

    n = tensors[0].numel()
    if n == 0:
        return
    shape = shape or flat("overlap_counts", out.device)
    reals = table([epsilon], torch.float64, out.device)
    overlap_counts_kernel[(triton.cdiv(n, shape.elements),)](
        tuple(tensors), reals, out, n, COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options()
    )
