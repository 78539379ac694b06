"""Arcee Fusion: take over from the other model only what is important, by magnitude and by the change of its row.

The importance of an element of ``d = w1 - w0`` is ``|d|`` times the Kullback-Leibler divergence of ``softmax(w1)`` from
``softmax(w0)`` over the last dimension, to both of which 1e-8 is added. With the quartiles of the importances of the
tensor, ``w0 + d`` where the importance is at least ``median + 1.5 (q3 - q1)``, else ``w0``. arcee-ai's mergekit, whose
conventions hold: a quantile is the element of rank ``int(q (n - 1))``.

Two things differ. mergekit takes the quartiles of tensors of more than a million elements from a random sample; here
they are exact. And it forms the divergence in the dtype of the weights, where most of it is lost: for a light fine-tune
it is about 1e-6, the sum of numbers that float32 knows to 1e-7. Here it is formed in float64; with ``compat: mergekit``
in bfloat16 and float16 each step is rounded as there.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from seme import dtypes
from seme.dtypes import DType
from seme.methods._magnitude import BINS
from seme.methods._passes import Group, Merge, Pass, Reduced
from seme.methods._registry import method
from seme.ops._rows import SIGN
from seme.ops.importance_fusion import OP as IMPORTANCE_FUSION
from seme.ops.importance_histogram import OP as IMPORTANCE_HISTOGRAM
from seme.ops.magnitude_histogram import find
from seme.ops.row_divergence import OP as ROW_DIVERGENCE

if TYPE_CHECKING:
    import torch

QUARTILES = (0.25, 0.5, 0.75)


def reference(tensors: Sequence[torch.Tensor], *, base: int) -> torch.Tensor:
    """The formula in float64, with a sort."""
    import torch

    origin, other = tensors[base].double(), tensors[1 - base].double()
    p, q = (torch.softmax(t, dim=-1) + 1e-8 for t in (other, origin))
    importance = (other - origin).abs() * torch.sum(p * torch.log(p / q), dim=-1, keepdim=True)
    ordered = importance.reshape(-1).sort().values
    q1, median, q3 = (ordered[int(q * (len(ordered) - 1))] for q in QUARTILES)
    return origin + (other - origin) * (importance >= median + 1.5 * (q3 - q1))


def row_length(shape: tuple[int, ...], arguments: Mapping[str, Any] | None = None) -> int:
    """Elements along the last dimension; 1 of a scalar, and where there are none."""
    return max(1, shape[-1]) if shape else 1


def value_of(key: int, compute: DType) -> float:
    """The importance that has a key (:mod:`seme.ops._rows`)."""
    if compute.itemsize == 8:
        return float(struct.unpack("<d", struct.pack("<q", key))[0])
    if compute.itemsize == 4:
        return float(struct.unpack("<f", struct.pack("<i", key))[0])
    magnitude, sign = abs(key - SIGN), -1 if key < SIGN else 1
    if compute == dtypes.bfloat16:
        return sign * float(struct.unpack("<f", struct.pack("<i", magnitude << 16))[0])
    return sign * float(struct.unpack("<e", struct.pack("<h", magnitude))[0])


def _quartiles(group: Group, rows: Mapping[str, Any]) -> Generator[Pass, Reduced, list[float]]:
    """The elements of rank ``int(q (n - 1))`` among the importances, by histograms of ever finer bins."""
    compute = group.compute_dtype
    shift = {2: 0, 4: 15, 8: 47}[compute.itemsize]  # all keys in 65536 bins
    wanted = [group.numel - int(q * (group.numel - 1)) for q in QUARTILES]  # from the top
    windows = [(0, shift)]
    while True:
        histogram = yield group.reduce(
            IMPORTANCE_HISTOGRAM, lowest=[low for low, _ in windows], shift=[s for _, s in windows], **rows
        )
        columns, found = histogram.shape[1], []
        for i, k in enumerate(wanted):
            line = i if len(windows) > 1 else 0
            bin_, _ = find(histogram.data, line, k - histogram.data[line * columns + BINS])
            found.append(windows[line][0] + (bin_ << shift))
        if shift == 0:
            return [value_of(key, compute) for key in found]
        shift = max(0, shift - 16)
        windows = [(key, shift) for key in found]


@method(
    "arcee_fusion",
    reference=reference,
    source="https://github.com/arcee-ai/mergekit",
    min_inputs=2,
    max_inputs=2,
    unit=row_length,
)
def merge(group: Group) -> Merge:
    """A pass for the divergence of the rows, one or two for the quartiles, one for the output."""
    assert group.base is not None
    compute, row = group.compute_dtype, row_length(group.inputs[0].shape)
    rounded = group.compat and compute.itemsize == 2
    divergences = yield group.reduce(ROW_DIVERGENCE, row=row, rounded=rounded)
    rows: dict[str, Any] = {"row": row, "factors": divergences.data}
    q1, median, q3 = yield from _quartiles(group, rows)
    spread = dtypes.round_to(compute, 1.5 * dtypes.round_to(compute, q3 - q1))
    threshold = dtypes.round_to(compute, median + spread)
    yield group.write(IMPORTANCE_FUSION, threshold=threshold, **rows)
