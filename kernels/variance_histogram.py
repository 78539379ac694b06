"""variance_histogram in Triton; the variance is described in ``seme/ops/_variance.py``.

One pass over the base and the inputs, in which zeros and keys beyond the window are counted per program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .magnitude_histogram import count_keys
from .numeric import magnitude_key
from .tables import Flat, flat, table
from .variance import load_deltas, variance

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType


@triton.jit
def variance_histogram_kernel(tensors, integers, counts, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """tensors: the base, then the others. integers: `lowest` and `shift`, in int64."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    _, deltas = load_deltas(tensors, offsets, mask, COMPUTE)
    key = magnitude_key(variance(deltas, COMPUTE), COMPUTE)
    count_keys(key, mask, tl.load(integers), tl.load(integers + 1), counts, COMPUTE)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    lowest: int,
    shift: int,
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; adds to `out`, int64 [1, 65538] seen as one axis."""
    import torch

    n = tensors[0].numel()
    if n == 0:
        return
    shape = shape or flat("variance_histogram", out.device)
    integers = table([lowest, shift], torch.int64, out.device)
    variance_histogram_kernel[(triton.cdiv(n, shape.elements),)](
        tuple(tensors), integers, out, n, COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options()
    )
