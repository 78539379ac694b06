"""Philox 4x32-10 in torch: random numbers that depend on a key and on the index of an element alone.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The twin of ``csrc/philox.h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LOWER = 0xFFFFFFFF
PER_BLOCK = 8
CERTAIN = 1 << 32
"""The chance of what is always kept."""


def philox(key: int, counter: list[torch.Tensor]) -> list[torch.Tensor]:
    """Four words, int64 tensors of 32-bit numbers, from four counters of the same kind and a key of 64 bits."""
    a, b, c, d = counter
    k0, k1 = key & LOWER, key >> 32
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64: the sign is a bit like the others
        a, b, c, d = (q >> 32) & LOWER ^ b ^ k0, q & LOWER, (p >> 32) & LOWER ^ d ^ k1, p & LOWER
        k0, k1 = (k0 + 0x9E3779B9) & LOWER, (k1 + 0xBB67AE85) & LOWER
    return [a, b, c, d]


def numbers(key: int, offset: int, count: int, device: torch.device | None = None) -> torch.Tensor:
    """int64 [count]: the 32-bit numbers of elements ``offset``, ``offset + 1``, ... of a tensor.

    Element e takes its upper half from the 16-bit number e % 8 of block e / 8 in plane 0, its lower half from plane 1;
    the counter of a block is (lower and upper 32 bits of its index, plane, 0).
    """
    import torch

    first, end = offset // PER_BLOCK, -(-(offset + count) // PER_BLOCK)
    block = torch.arange(first, end, dtype=torch.int64, device=device)
    total = torch.zeros(PER_BLOCK * len(block), dtype=torch.int64, device=device)
    for plane in range(2):
        words = philox(key, [block & LOWER, block >> 32, torch.full_like(block, plane), torch.zeros_like(block)])
        halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)
        total = (total << 16) + halves.reshape(-1)
    begin = offset - first * PER_BLOCK
    return total[begin : begin + count]
