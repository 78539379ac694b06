"""RAM+: RAM, with what a model alone changes amplified the more, the more of its changes others share.

As :mod:`seme.methods.ram`; what model i alone changes is multiplied by ``1 + r min(rho_i, alpha)``, where ``rho_i`` is
the number of its elements that other models change as well, over that of those it alone changes (at least
``epsilon``), in this tensor. Xia et al. 2026, Reinforced Agent Merging, arXiv 2601.13572; parameters, defaults and
order of operations are mergekit's, which forms the scales in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme.dtypes import float32, round_to
from seme.methods._passes import Group, Merge
from seme.methods._registry import method
from seme.ops.overlap_counts import OP as OVERLAP_COUNTS
from seme.ops.ram import OP as RAM
from seme.ops.task_vector_sum import OP as TASK_VECTOR_SUM

if TYPE_CHECKING:
    import torch


def reference(
    tensors: Sequence[torch.Tensor], *, base: int, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5
) -> torch.Tensor:
    """The formula in float64."""
    import torch

    origin = tensors[base].double()
    deltas = torch.stack([t.double() - origin for i, t in enumerate(tensors) if i != base])
    changed = deltas.abs() > epsilon
    count = changed.sum(0)
    merged = torch.zeros_like(origin)
    for delta, mask in zip(deltas, changed):
        alone, shared = mask & (count == 1), mask & (count > 1)
        rho = float(shared.sum()) / max(float(alone.sum()), epsilon) if alone.any() else 0.0
        scale = 1 + r * min(max(rho, 0.0), alpha)
        merged += scale * delta * alone + delta * shared / count.clamp(min=1)
    return origin + merged


def scale(shared: int, alone: int, r: float, alpha: float, epsilon: float) -> float:
    """What a model's own changes are multiplied by, if there are any; each operation in float32."""
    if not alone:
        return 1.0
    rho = round_to(float32, round_to(float32, shared) / max(round_to(float32, alone), round_to(float32, epsilon)))
    bounded = min(max(rho, 0.0), round_to(float32, alpha))
    return round_to(float32, 1 + round_to(float32, round_to(float32, r) * bounded))


@method("ramplus_tl", reference=reference, source="https://arxiv.org/abs/2601.13572")
def merge(group: Group, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Merge:
    """A pass for the counts and one for the output.

    Args:
        r: how much of the overlap is added to the scale of what a model alone changes.
        alpha: the greatest overlap that counts.
        epsilon: a task vector of at most this magnitude changes nothing.
    """
    if not group.experts:
        yield group.write(TASK_VECTOR_SUM, weights=())  # the base model
        return
    counts = (yield group.reduce(OVERLAP_COUNTS, epsilon=epsilon)).data
    scales = [scale(shared, alone, r, alpha, epsilon) for shared, alone in zip(counts[::2], counts[1::2])]
    yield group.write(RAM, scales=scales, epsilon=epsilon, rounded=False)
