"""DELLA: random parts of task vectors, larger magnitudes more often, of which what agrees in sign is averaged.

The same elements of the task vectors are kept and scaled as by :mod:`della_linear <seme.methods.della_linear>`; then
signs are elected as by :mod:`ties <seme.methods.ties>`, and only what agrees with them is merged. Deep et al. 2024,
arXiv 2406.11617; Yadav et al. 2023, arXiv 2306.01708. Parameters, defaults and order of operations are mergekit's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from seme.methods import ties
from seme.methods._passes import Group, Merge
from seme.methods._registry import AT_LEAST_0, FRACTION, PerExpert, method
from seme.methods._sparse import by_rank, merge_kept
from seme.methods._sparse import reference as merged
from seme.methods.della_linear import check_chances, parts, unit

if TYPE_CHECKING:
    import torch


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    base: int,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    normalize: bool = True,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
    name: str,
    seed: int = 0,
) -> torch.Tensor:
    """The formula in float64, with the masks of tensor ``name`` and ``seed``."""
    return merged(
        tensors[base].double(),
        parts(tensors, base, density, epsilon, name, seed),
        elect=True,
        weight=weight,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
    )


def check(group: Group, arguments: Mapping[str, Any]) -> None:
    """Weights as of TIES, and the probabilities."""
    ties.check(group, arguments)
    check_chances(group, arguments)


@method("della", reference=reference, source="https://arxiv.org/abs/2406.11617", check=check, unit=unit)
def merge(
    group: Group,
    *,
    weight: PerExpert,
    density: Annotated[PerExpert, FRACTION] = 1.0,  # type: ignore[assignment]
    epsilon: Annotated[PerExpert, AT_LEAST_0] = 0.15,  # type: ignore[assignment]
    normalize: bool = True,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Merge:
    """One pass for the L1 norms, if they are asked for, and one for the output; both rank the elements of each row.

    Args:
        weight: weight of the model's task vector.
        density: mean probability that an element of the task vector is kept.
        epsilon: how much the probability lies below it for the smallest, above it for the greatest magnitude of a row.
        normalize: divide by the sum of the weights that agree with the elected sign.
        rescale: scale what is kept of each task vector to the L1 norm of the whole.
        int8_mask: accepted for mergekit's sake; masks are never stored here.
        lambda: scale of the merged task vector.
    """
    selection = by_rank(group, density, epsilon)
    yield from merge_kept(
        group, selection, elect=True, weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_
    )
