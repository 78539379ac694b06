"""importance_fusion in Triton; the formula is in ``seme/ops/importance_fusion.py``. One pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .importance import importance
from .numeric import held, store
from .tables import Flat, flat, table

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def importance_fusion_kernel(base, x, factors, reals, out, n, row, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """factors: one float64 per row. reals: the threshold, in float64."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    b, delta, score = importance(base, x, factors, row, offsets, mask, COMPUTE)
    store(out, offsets, b + tl.where(score >= held(tl.load(reals), COMPUTE), delta, 0.0), mask)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    row: int,
    factors: Sequence[float],
    threshold: float,
    offset: int,
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; writes `out`."""
    import torch

    n = out.numel()
    if n == 0:
        return
    shape = shape or flat("importance_fusion", out.device)
    own = table(factors[offset // row : (offset + n) // row], torch.float64, out.device)
    reals = table([threshold], torch.float64, out.device)
    importance_fusion_kernel[(triton.cdiv(n, shape.elements),)](
        tensors[0], tensors[1], own, reals, out, n, row,
        COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options(),
    )  # fmt: skip
