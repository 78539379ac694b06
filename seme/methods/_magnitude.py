"""The exact magnitude threshold of a tensor's task vectors, without sorting and without holding them.

A float's bits without the sign grow with its magnitude, so the k-th largest magnitude is found by counting bits
in a window of 65536 bins. A sample places the window; one full pass then usually settles it, because a bin that
holds a single distinct value needs no refinement. Where it does not, the window moves or narrows and the pass is
repeated: the answer is exact in every case.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

from seme import dtypes
from seme.methods._passes import Countdown, Group, Pass, Reduced
from seme.ops.magnitude_histogram import OP as MAGNITUDE_HISTOGRAM
from seme.ops.magnitude_histogram import find
from seme.ops.tie_counts import OP as TIE_COUNTS

BINS = 65536
EVERY = (0, 2**62)
"""Threshold and quota that keep every element."""
NONE = (2**63 - 1, 0)
"""Threshold and quota that keep no element."""
SAMPLE_FROM = 1 << 20
"""Elements below which a sample saves nothing."""

Cut = tuple[int, int]
"""A threshold and a quota: what lies above it are keys above the threshold, and the first ties with it."""


def key_bits(compute: dtypes.DType) -> int:
    """Bits of a magnitude in the compute dtype."""
    return compute.itemsize * 8 - 1


def _window(low: int, high: int) -> tuple[int, int]:
    """The window of bins that covers keys [low, high): lowest key and log2 of keys per bin."""
    return low, max(0, (high - low - 1).bit_length() - 16)


def _inputs(group: Group, order: Sequence[int]) -> tuple[int, ...]:
    """The base, and the expert of each cut: those of the second cuts come after those of the first."""
    assert group.base is not None
    return (group.base, *(group.experts[at % len(group.experts)] for at in order))


def _first_windows(group: Group, counts: dict[int, int]) -> Generator[Pass, Reduced, dict[int, tuple[int, int]]]:
    bits = key_bits(group.compute_dtype)
    whole = _window(0, 1 << bits)
    if whole[1] == 0 or group.numel < SAMPLE_FROM:
        return dict.fromkeys(counts, whole)
    order = list(counts)
    sample = yield group.reduce(
        MAGNITUDE_HISTOGRAM,
        _inputs(group, order),
        sample=True,
        lowest=[whole[0]] * len(order),
        shift=[whole[1]] * len(order),
    )
    windows = {}
    for row, at in enumerate(order):
        rank = counts[at] * sample.numel / group.numel
        # Four standard deviations of an independent sample, and 1 % because neighbours are not independent.
        margin = 4 * math.sqrt(rank * max(0.0, 1 - rank / sample.numel)) + 0.01 * sample.numel
        low, _ = find(sample.data, row, min(sample.numel, int(rank + margin)))
        high, _ = find(sample.data, row, max(1, int(rank - margin)))
        windows[at] = _window(low << whole[1], (high + 1) << whole[1])
    return windows


def cuts(group: Group, counts: Sequence[int]) -> Generator[Pass, Reduced, list[Cut]]:
    """For one count per expert, or two (the second ones after the first): where to cut.

    Exactly so many elements lie above: those that a stable descending sort by magnitude would put first.
    """
    found: dict[int, Cut] = {}
    wanted: dict[int, int] = {}
    for at, count in enumerate(counts):
        if 0 < count < group.numel:
            wanted[at] = count
        else:
            found[at] = EVERY if count > 0 else NONE
    windows = (yield from _first_windows(group, wanted)) if wanted else {}
    end = 1 << key_bits(group.compute_dtype)
    while windows:
        # Two cuts of one expert share the table of a window, which in 16-bit types is the same for both.
        tables = {at: (at % len(group.experts), windows[at]) for at in windows}
        distinct = list(dict.fromkeys(tables.values()))
        histogram = yield group.reduce(
            MAGNITUDE_HISTOGRAM,
            _inputs(group, [expert for expert, _ in distinct]),
            lowest=[lowest for _, (lowest, _) in distinct],
            shift=[shift for _, (_, shift) in distinct],
        )
        columns = histogram.shape[1]
        for at, table in tables.items():
            row, k, (lowest, shift) = distinct.index(table), wanted[at], windows.pop(at)
            beyond, mixed = histogram.data[row * columns + BINS], histogram.data[row * columns + BINS + 1]
            if beyond >= k:
                windows[at] = _window(lowest + (BINS << shift), end)
                continue
            bin_, above = find(histogram.data, row, k - beyond)
            key = lowest + (bin_ << shift)
            if bin_ < 0:
                windows[at] = _window(0, lowest)
            elif shift == 0 or mixed == 0:
                quota = k - beyond - above
                # Nothing to count along the tensor where all of a tie remain, nor among zeros: they add nothing.
                all_remain = key == 0 or quota == histogram.data[row * columns + bin_]
                found[at] = (key, EVERY[1] if all_remain else quota)
            else:
                windows[at] = _window(key, key + (1 << shift))
    return [found[at] for at in range(len(counts))]


def countdown(group: Group, found: Sequence[Cut]) -> Countdown | None:
    """What lets chunks share the quotas of :func:`cuts`; None if no quota binds."""
    if all(quota in (EVERY[1], NONE[1]) for _, quota in found):
        return None
    params = group.check(TIE_COUNTS, thresholds=[threshold for threshold, _ in found])
    return Countdown(TIE_COUNTS, params, "tie_quotas")
