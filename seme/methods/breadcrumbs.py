"""Model Breadcrumbs: task vectors without their outliers and their small changes, added to a base model.

Of every task vector of N elements the ``int(gamma * N)`` largest magnitudes are dropped, the ``int(density * N)`` after
them are kept, the rest is dropped; ``w0 + lambda * sum_i weight_i`` of what is kept. Where both do not fit, fewer
outliers are dropped, so that the density holds. Davari and Belilovsky 2023, arXiv 2312.06795.

Parameters, defaults and order of operations are mergekit's: the cuts are per tensor (in the paper per row), density 1
keeps everything, outliers too. Equal magnitudes count in element order, those of lowest index as the greatest; mergekit
leaves the choice among them to an unstable sort.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from seme.methods._passes import Group, Merge
from seme.methods._registry import FRACTION, PerExpert, method
from seme.methods._sparse import by_magnitude, merge_kept
from seme.methods._sparse import reference as merged
from seme.methods.task_arithmetic import check

if TYPE_CHECKING:
    import torch


def counts(density: float, gamma: float, numel: int) -> tuple[int, int]:
    """(greatest elements that are not dropped as small, how many of them are dropped as outliers)."""
    if density >= 1:
        return numel, 0
    kept = int(density * numel)
    outliers = min(int(gamma * numel), numel - kept)
    return (kept + outliers, outliers) if kept else (0, 0)


def trails(
    tensors: Sequence[torch.Tensor], base: int, density: Sequence[float], gamma: Sequence[float]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Task vectors in float64 and masks of what is kept of them, with a sort."""
    import torch

    origin = tensors[base].double()
    found = []
    for tensor, d, g in zip((t for i, t in enumerate(tensors) if i != base), density, gamma):
        delta = tensor.double() - origin
        order = torch.sort(delta.abs().reshape(-1), descending=True, stable=True).indices
        size = delta.numel()
        outliers = int(g * size) if d < 1 else 0
        begin = min(outliers, size - int(d * size))
        mask = torch.zeros(size, dtype=torch.bool)
        mask[order[begin : begin + int(d * size)]] = True
        found.append((delta, mask.reshape(delta.shape)))
    return found


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    base: int,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> torch.Tensor:
    """The formula in float64, with a sort."""
    return merged(
        tensors[base].double(),
        trails(tensors, base, density, gamma),
        elect=False,
        weight=weight,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
    )


@method("breadcrumbs", reference=reference, source="https://arxiv.org/abs/2312.06795", check=check)
def merge(
    group: Group,
    *,
    weight: PerExpert,
    density: Annotated[PerExpert, FRACTION] = 1.0,  # type: ignore[assignment]
    gamma: Annotated[PerExpert, FRACTION] = 0.01,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Merge:
    """A sample, one pass for the thresholds (rarely more), one for the output.

    Args:
        weight: weight of the model's task vector.
        density: share of the task vector's elements that is kept, per tensor.
        gamma: share of the elements, the largest, that is dropped, as far as the density leaves room.
        normalize: divide by the sum of the weights.
        rescale: scale what is kept of each task vector back to the L1 norm of the whole.
        int8_mask: accepted for mergekit's sake; masks are never stored here.
        lambda: scale of the merged task vector.
    """
    found = [counts(d, g, group.numel) for d, g in zip(density, gamma)]
    selection = yield from by_magnitude(group, [above for above, _ in found], [outliers for _, outliers in found])
    yield from merge_kept(
        group, selection, elect=False, weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_
    )
