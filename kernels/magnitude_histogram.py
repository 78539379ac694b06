"""magnitude_histogram in Triton; bins and columns are described in ``seme/ops/magnitude_histogram.py``.

One pass over the base and the inputs. Keys beyond the window and zeros, which are most of the keys, are counted
per program; the others go to their bins by atomic additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .numeric import key_bound, load, magnitude_key, round_to
from .tables import Flat, flat, table

if TYPE_CHECKING:
    import torch

    from seme.dtypes import DType

BINS = tl.constexpr(65536)
COLUMNS = tl.constexpr(65538)  # the bins, the keys beyond the window, the keys that are not the first of their bin


@triton.jit
def count_keys(key, mask, lowest, shift, row, COMPUTE: tl.constexpr):
    """Adds keys to the columns of `row`, for a window given in int64."""
    lowest = key_bound(lowest, COMPUTE)
    shift = shift.to(lowest.dtype)
    if COMPUTE != "float64":
        shift = tl.minimum(shift, 31)
    counted = mask & (key >= lowest)
    above = tl.where(counted, key - lowest, 0)
    bin = above >> shift
    inside = counted & (bin < BINS)
    # Values that are exactly zero can be most of a tensor: one addition for all of them, not one each.
    zero = inside & (key == 0)
    zeros = tl.sum(zero.to(tl.int64), axis=0)
    beyond = tl.sum((counted & (bin >= BINS)).to(tl.int64), axis=0)
    mixed = tl.sum((inside & (above != (bin << shift))).to(tl.int64), axis=0)
    one = tl.full(key.shape, 1, tl.int64)
    tl.atomic_add(row + bin, one, mask=inside & (key != 0), sem="relaxed")
    tl.atomic_add(row, zeros, mask=zeros > 0, sem="relaxed")
    tl.atomic_add(row + BINS, beyond, mask=beyond > 0, sem="relaxed")
    tl.atomic_add(row + BINS + 1, mixed, mask=mixed > 0, sem="relaxed")


@triton.jit
def magnitude_histogram_kernel(tensors, integers, counts, n, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """tensors: the base, then the others. integers: `lowest` of each, then `shift` of each, in int64."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    base = load(tensors[0], offsets, mask, COMPUTE)
    for i in tl.static_range(1, len(tensors)):
        key = magnitude_key(round_to(load(tensors[i], offsets, mask, COMPUTE) - base, COMPUTE), COMPUTE)
        lowest, shift = tl.load(integers + i - 1), tl.load(integers + len(tensors) + i - 2)
        count_keys(key, mask, lowest, shift, counts + (i - 1) * COLUMNS, COMPUTE)


def launch(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    lowest: Sequence[int],
    shift: Sequence[int],
    compute_dtype: DType,
    shape: Flat | None = None,
) -> None:
    """Run on flat, contiguous tensors, the base first; adds to `out`, int64 [n, 65538] seen as one axis."""
    import torch

    n = tensors[0].numel()
    if n == 0 or len(tensors) == 1:
        return
    integers = table([*lowest, *shift], torch.int64, out.device)
    shape = shape or flat("magnitude_histogram", out.device)
    magnitude_histogram_kernel[(triton.cdiv(n, shape.elements),)](
        tuple(tensors), integers, out, n, COMPUTE=compute_dtype.name, BLOCK=shape.elements, **shape.options()
    )
