"""Philox 4x32-10 in Triton: the numbers of ``seme/ops/_philox.py``, 16 bits at a time.

Element e of a tensor takes number e % 8 of block e / 8; plane 0 holds the upper halves, plane 1 the lower ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _words(key, block, plane):
    """The four words of each block of counters, uint32."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(key, low, high, zero + plane, zero)


@triton.jit
def halves(key, first, plane, N: tl.constexpr, ALIGNED: tl.constexpr):
    """int32: the numbers of N elements from `first` on (from each of a column) in a plane.

    ALIGNED: `first` is a multiple of 8, so that each block of counters is needed once.
    """
    if ALIGNED:
        block = first // 8 + tl.arange(0, N // 8)
        a, b, c, d = _words(key, block, plane)
        words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
        return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32)
    else:
        at = first + tl.arange(0, N)
        a, b, c, d = _words(key, at // 8, plane)
        place = (at % 8).to(tl.int32)
        word = tl.where(place < 4, tl.where(place < 2, a, b), tl.where(place < 6, c, d))
        return tl.where(place % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)


@triton.jit
def drawn(key, chance, first, N: tl.constexpr, ALIGNED: tl.constexpr):
    """True where the element is kept, with a chance of `chance` / 2^32; elements as in :func:`halves`."""
    upper = halves(key, first, 0, N, ALIGNED)
    bound = (chance >> 16).to(tl.int32)
    stays = upper < bound
    undecided = upper == bound
    if tl.max(undecided.to(tl.int32)) > 0:
        lower = halves(key, first, 1, N, ALIGNED)
        stays = stays | (undecided & (lower < (chance & 0xFFFF).to(tl.int32)))
    return stays
