"""Model Breadcrumbs with TIES' election of signs: outliers and small changes dropped, what agrees added.

The same elements of the task vectors are kept as by :mod:`breadcrumbs <seme.methods.breadcrumbs>`; then signs are
elected as by :mod:`ties <seme.methods.ties>`, and only what agrees with them is added. Davari and Belilovsky 2023,
arXiv 2312.06795; Yadav et al. 2023, arXiv 2306.01708. Parameters, defaults and order of operations are mergekit's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from seme.methods._passes import Group, Merge
from seme.methods._registry import FRACTION, PerExpert, method
from seme.methods._sparse import by_magnitude, merge_kept
from seme.methods._sparse import reference as merged
from seme.methods.breadcrumbs import counts, trails
from seme.methods.ties import check

if TYPE_CHECKING:
    import torch


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
        elect=True,
        weight=weight,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
    )


@method("breadcrumbs_ties", reference=reference, source="https://arxiv.org/abs/2312.06795", check=check)
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
        normalize: divide by the sum of the weights that agree with the elected sign.
        rescale: scale what is kept of each task vector back to the L1 norm of the whole.
        int8_mask: accepted for mergekit's sake; masks are never stored here.
        lambda: scale of the merged task vector.
    """
    found = [counts(d, g, group.numel) for d, g in zip(density, gamma)]
    selection = yield from by_magnitude(group, [above for above, _ in found], [outliers for _, outliers in found])
    yield from merge_kept(
        group, selection, elect=True, weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_
    )
