"""importance_histogram in Triton; the keys are described in ``seme/ops/_rows.py``. One pass, for all windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .importance import importance, importance_key
from .magnitude_histogram import count_keys
from .tables import Flat, flat, table

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType

COLUMNS = tl.constexpr(65538)


@triton.jit
def importance_histogram_kernel(
    base, x, factors, integers, counts, n, row, WINDOWS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):
    """factors: one float64 per row. integers: `lowest` and `shift` of each window, in int64."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    _, _, score = importance(base, x, factors, row, offsets, mask, COMPUTE)
    key = importance_key(score, COMPUTE)
    for i in tl.static_range(WINDOWS):
        lowest, shift = tl.load(integers + 2 * i), tl.load(integers + 2 * i + 1)
        count_keys(key, mask, lowest, shift, counts + i * COLUMNS, COMPUTE)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    row: int,
    factors: Sequence[float],
    lowest: Sequence[int],
    shift: Sequence[int],
    offset: int,
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; adds to `out`, int64 [windows, 65538] seen as one axis."""
    import torch

    n = tensors[0].numel()
    if n == 0 or not lowest:
        return
    shape = shape or flat("importance_histogram", out.device)
    own = table(factors[offset // row : (offset + n) // row], torch.float64, out.device)
    integers = table([v for pair in zip(lowest, shift) for v in pair], torch.int64, out.device)
    importance_histogram_kernel[(triton.cdiv(n, shape.elements),)](
        tensors[0], tensors[1], own, integers, out, n, row,
        WINDOWS=len(lowest), COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options(),
    )  # fmt: skip
