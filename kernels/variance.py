"""The variance of each element over the task vectors, and selection by it: what the kernels of SCE share."""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric import held, load, round_to


@triton.jit
def load_deltas(tensors, offsets, mask, COMPUTE: tl.constexpr):
    """The base at `offsets`, and the task vectors of the other tensors as a tuple."""
    base = load(tensors[0], offsets, mask, COMPUTE)
    deltas = ()
    for i in tl.static_range(1, len(tensors)):
        delta = round_to(load(tensors[i], offsets, mask, COMPUTE) - base, COMPUTE)
        deltas = deltas + (delta,)  # noqa: RUF005 (the compiler knows only this form)
    return base, deltas


@triton.jit
def variance(deltas, COMPUTE: tl.constexpr):
    """The population variance of a tuple of task vectors, formed in float64 and rounded to the compute dtype."""
    first = deltas[0].to(tl.float64)
    total = tl.zeros_like(first)
    squares = tl.zeros_like(first)
    for i in tl.static_range(1, len(deltas)):
        deviation = deltas[i].to(tl.float64) - first
        total += deviation
        squares += deviation * deviation
    spread = (squares * len(deltas) - total * total) / (len(deltas) * len(deltas))
    return round_to(held(spread, COMPUTE), COMPUTE)
