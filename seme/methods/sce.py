"""SCE: select the positions where the models vary most, weight each model by its energy there, erase minority signs.

For the task vectors ``d_i = w_i - w0`` of a tensor: keep the ``select_topk`` share of the positions whose variance over
the models is not 0, those of largest variance, and zero the others; give model i the coefficient ``c_i = mean(d_i^2) /
sum_j mean(d_j^2)``; elect ``sign(sum_i d_i)`` per position, where 0 votes plus; ``w0 + sum_i c_i d_i / max(sum_i c_i,
1e-6)`` over the models that agree with it. Wan et al. 2024 (FuseChat), arXiv 2408.07990.

Parameters, defaults and order of operations are mergekit's, but for one: mergekit weights all models alike where
``sum_j mean(d_j^2)`` is below 1e-6, as it is for most light fine-tunes; here that needs ``compat: mergekit``. Among
equal variances those of lowest index are kept, so exactly ``int(select_topk * positions that vary)`` remain; mergekit
leaves the choice among them to an unstable selection.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from seme import dtypes
from seme.methods._magnitude import BINS, EVERY, Cut, key_bits
from seme.methods._passes import Countdown, Group, Merge, Pass, Reduced
from seme.methods._registry import FRACTION, method
from seme.ops.magnitude_histogram import find
from seme.ops.sce import OP as SCE
from seme.ops.selected_squares import OP as SELECTED_SQUARES
from seme.ops.task_vector_sum import OP as TASK_VECTOR_SUM
from seme.ops.variance_histogram import OP as VARIANCE_HISTOGRAM
from seme.ops.variance_ties import OP as VARIANCE_TIES

if TYPE_CHECKING:
    import torch

SMALL_ENERGY = 1e-6
"""With ``compat: mergekit``: sums of mean squares below this weight all models alike."""


def selected_count(select_topk: float, nonzero: int) -> int:
    """How many positions are selected of those that vary; the product is formed in float32, as in mergekit."""
    share, count = (dtypes.round_to(dtypes.float32, v) for v in (select_topk, nonzero))
    return int(dtypes.round_to(dtypes.float32, share * count))


def reference(
    tensors: Sequence[torch.Tensor], *, base: int, select_topk: float = 1.0, int8_mask: bool = False
) -> torch.Tensor:
    """The paper's three steps in float64, with a sort for the selection."""
    import torch

    origin = tensors[base].double()
    deltas = torch.stack([t.double() - origin for i, t in enumerate(tensors) if i != base])
    if select_topk < 1:
        # n times the sum of squares less the square of the sum: exact on a grid, so that equal variances are.
        variance = (len(deltas) * deltas.square().sum(0) - deltas.sum(0).square()).reshape(-1)
        order = torch.sort(variance, descending=True, stable=True).indices
        mask = torch.zeros_like(variance)
        mask[order[: selected_count(max(0.0, select_topk), int((variance > 0).sum()))]] = 1
        deltas = deltas * mask.reshape(origin.shape)
    energy = deltas.square().reshape(len(deltas), -1).mean(1)
    share = energy / energy.sum() if energy.sum() > 0 else torch.full_like(energy, 1 / len(energy))
    share = share.reshape((-1,) + (1,) * origin.dim())
    agrees = torch.sign(deltas) == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    return origin + (share * deltas * agrees).sum(0) / (share * agrees).sum(0).clamp(min=1e-6)


def _cut(group: Group, select_topk: float) -> Generator[Pass, Reduced, Cut | None]:
    """Threshold key and quota of the variance; None if no position is selected.

    A variance whose key falls into the first of 65536 bins counts as 0: it is below 2^-133 in float32.
    """
    lowest, shift, wanted = 0, max(0, key_bits(group.compute_dtype) - 16), None
    while True:
        data = (yield group.reduce(VARIANCE_HISTOGRAM, lowest=lowest, shift=shift)).data
        if wanted is None:
            wanted = selected_count(select_topk, group.numel - data[0])
            if wanted == 0:
                return None
        bin_, above = find(data, 0, wanted - data[BINS])
        key, quota = lowest + (bin_ << shift), wanted - data[BINS] - above
        if shift == 0 or data[BINS + 1] == 0:
            return key, EVERY[1] if quota == data[bin_] else quota
        lowest, shift = key, max(0, shift - 16)


@method("sce", reference=reference, source="https://arxiv.org/abs/2408.07990")
def merge(
    group: Group,
    *,
    select_topk: Annotated[float, FRACTION] = 1.0,
    int8_mask: bool = False,
) -> Merge:
    """A pass for the energies and one for the output; with a selection two more for its threshold.

    Args:
        select_topk: share of the positions with a variance that is selected, per tensor.
        int8_mask: accepted for mergekit's sake; masks are never stored here.
    """
    assert group.base is not None
    cut: Cut | None = EVERY if group.experts else None
    if cut is not None and select_topk < 1:
        cut = yield from _cut(group, select_topk)
    if cut is None:
        yield group.write(TASK_VECTOR_SUM, (group.base,), weights=())  # the base model
        return
    selection: dict[str, Any] = {"thresholds": [cut[0]], "tie_quotas": [cut[1]]}
    countdown = None
    if cut[1] < EVERY[1]:
        countdown = Countdown(VARIANCE_TIES, group.check(VARIANCE_TIES, thresholds=[cut[0]]), "tie_quotas")
    squares = yield group.reduce(SELECTED_SQUARES, countdown=countdown, **selection)
    n = len(group.experts)
    energies = [math.fsum(squares.data[i::n]) / group.numel for i in range(n)]
    yield group.write(SCE, coefficients=_coefficients(group, energies), countdown=countdown, **selection)


def _coefficients(group: Group, energies: Sequence[float]) -> list[float]:
    """Shares of the mean squares; equal ones if there is nothing to share."""
    total = math.fsum(energies)
    even = total == 0
    if group.compat:
        energies = [dtypes.round_to(group.compute_dtype, e) for e in energies]
        total = dtypes.round_to(group.compute_dtype, math.fsum(energies))
        even = total < SMALL_ENERGY
    return [1 / len(energies) if even else e / total for e in energies]
