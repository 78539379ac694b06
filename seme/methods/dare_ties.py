"""DARE with TIES' election of signs: random parts of task vectors, of which what agrees is added.

The same elements of the task vectors are kept and scaled as by :mod:`dare_linear <seme.methods.dare_linear>`; then
signs are elected as by :mod:`ties <seme.methods.ties>`, and only what agrees with them is added. Yu et al. 2024, arXiv
2311.03099; Yadav et al. 2023, arXiv 2306.01708. Parameters, defaults and order of operations are mergekit's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from seme.methods._passes import Group, Merge
from seme.methods._registry import FRACTION, PerExpert, method
from seme.methods._sparse import by_chance, merge_kept
from seme.methods._sparse import reference as merged
from seme.methods.dare_linear import parts
from seme.methods.ties import check

if TYPE_CHECKING:
    import torch


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    base: int,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool = False,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
    name: str,
    seed: int = 0,
) -> torch.Tensor:
    """The formula in float64, with the masks of tensor ``name`` and ``seed``."""
    return merged(
        tensors[base].double(),
        parts(tensors, base, density, name, seed),
        elect=True,
        weight=weight,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
    )


@method("dare_ties", reference=reference, source="https://arxiv.org/abs/2311.03099", check=check)
def merge(
    group: Group,
    *,
    weight: PerExpert,
    density: Annotated[PerExpert, FRACTION] = 1.0,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Merge:
    """One pass for the L1 norms, if they are asked for, and one for the output.

    Args:
        weight: weight of the model's task vector.
        density: probability that an element of the task vector is kept.
        normalize: divide by the sum of the weights that agree with the elected sign.
        rescale: scale what is kept of each task vector to the L1 norm of the whole.
        int8_mask: accepted for mergekit's sake; masks are never stored here.
        lambda: scale of the merged task vector.
    """
    selection = by_chance(group, density)
    yield from merge_kept(
        group, selection, elect=True, weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_
    )
