"""The importance of elements and its keys, which the kernels of Arcee Fusion share; see ``seme/ops/_rows.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric import held, load, magnitude_key, round_to


@triton.jit
def importance(base, x, factors, row, offsets, mask, COMPUTE: tl.constexpr):
    """(base, task vector, importance) at `offsets`; factors: one float64 per row."""
    b = load(base, offsets, mask, COMPUTE)
    delta = round_to(load(x, offsets, mask, COMPUTE) - b, COMPUTE)
    factor = round_to(held(tl.load(factors + offsets // row, mask=mask, other=0.0), COMPUTE), COMPUTE)
    return b, delta, round_to(tl.abs(delta) * factor, COMPUTE)


@triton.jit
def importance_key(score, COMPUTE: tl.constexpr):
    """An integer that grows with an importance."""
    key = magnitude_key(score, COMPUTE)
    if COMPUTE == "bfloat16" or COMPUTE == "float16":
        return tl.where(score < 0, 0x8000 - key, 0x8000 + key)
    else:
        return key
