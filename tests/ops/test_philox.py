"""Random numbers: known answers, and an element's number depends on its index alone."""

import pytest
import torch

from seme.ops import task_vector_sum
from seme.ops._philox import numbers, philox

# Known answers of philox4x32-10, published with Random123 (Salmon et al. 2011): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    found = philox(key[0] | key[1] << 32, [torch.tensor([c]) for c in counter])
    assert tuple(int(w) for w in found) == words


def test_layout():
    """Eight numbers per block; the upper half of the first one is the lower half of the first word in plane 0."""
    assert int(numbers(0, 0, 1)) >> 16 == 0x6627E8D5 & 0xFFFF
    assert int(numbers(0, 7, 1)) >> 16 == 0x9B00DBD8 >> 16


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 2**35 + 3])
def test_numbers_depend_on_the_index_alone(offset):
    whole = numbers(5, offset, 100)
    for begin, end in ((0, 1), (3, 30), (8, 100)):
        assert torch.equal(numbers(5, offset + begin, end - begin), whole[begin:end])
    assert not torch.equal(numbers(6, offset, 100), whole)


def test_numbers_are_uniform():
    found = numbers(1, 0, 1 << 18).double() / 2**32
    # Five standard deviations of a mean, and of a share, of 2^18 independent uniform numbers.
    assert abs(float(found.mean()) - 0.5) < 5 * (1 / 12 / 2**18) ** 0.5
    for bit in range(32):
        share = float((numbers(1, 0, 1 << 18) >> bit & 1).double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / 2**9, bit


@pytest.mark.parametrize("chance", [1, 40_000, 2**16, 2**31 + 7, 2**32 - 1])
def test_comparisons_that_the_upper_half_leaves_open(chance):
    """Of 2^20 elements about 16 have the upper half of the chance, and the lower one decides."""
    n = 1 << 20
    drawn = task_vector_sum(
        torch.zeros(n), [torch.ones(n)], [1.0], chances=[chance], seeds=[9], offset=24, backend="cpu"
    )
    found = numbers(9, 24, n)
    assert (found >> 16 == chance >> 16).sum() > 0
    assert torch.equal(drawn, (found < chance).float())
