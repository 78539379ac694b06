"""DELLA without election of signs: random parts of task vectors, larger magnitudes more often, added to a base model.

In every row of a task vector the elements are ranked by magnitude, and the one of rank r of n, from 0, is kept with a
probability of ``density - epsilon + 2 epsilon r / (n - 1)``, independently of the others; what is kept is multiplied by
``|d|_1 / |kept d|_1`` (``rescale``), of the whole tensor; ``w0 + lambda * sum_i weight_i`` of that. Deep et al. 2024,
arXiv 2406.11617, who scale each element by one over its probability.

Parameters, defaults and order of operations are mergekit's; density 1 keeps everything, density 0 nothing. Rows lie
along the last dimension, a vector is one row, and a row of one element is kept with a probability of ``density``. Of
equal magnitudes the one of lower index has the lower rank; mergekit leaves their order to an unstable sort. Elements
draw the numbers that they draw in :mod:`dare_linear <seme.methods.dare_linear>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from seme.errors import ConfigError
from seme.methods import task_arithmetic
from seme.methods._passes import Group, Merge
from seme.methods._registry import AT_LEAST_0, FRACTION, PerExpert, method
from seme.methods._sparse import by_rank, chance, merge_kept, row_of, stream
from seme.methods._sparse import reference as merged

if TYPE_CHECKING:
    import torch


def parts(
    tensors: Sequence[torch.Tensor],
    base: int,
    density: Sequence[float],
    epsilon: Sequence[float],
    name: str,
    seed: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Task vectors in float64 and masks of what is kept of them, with a sort of every row."""
    from seme.ops._philox import CERTAIN, numbers

    origin = tensors[base].double()
    found = []
    for i, d, e in zip((i for i in range(len(tensors)) if i != base), density, epsilon):
        delta = tensors[i].double() - origin
        draws = numbers(stream(name, i, seed), 0, delta.numel()).reshape(delta.shape)
        n = row_of(tuple(delta.shape))
        if not 0 < d < 1 or n < 2:
            found.append((delta, draws < chance(d)))
            continue
        ranks = delta.abs().sort(dim=-1, stable=True).indices.argsort(dim=-1)
        probability = d - e + 2 * e * ranks.double() / (n - 1)
        found.append((delta, draws.double() / CERTAIN < probability))
    return found


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    base: int,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
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
        parts(tensors, base, density, epsilon, name, seed),
        elect=False,
        weight=weight,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
    )


def check_chances(group: Group, arguments: Mapping[str, Any]) -> None:
    """Probabilities between 0 and 1, in the whole row, unless a task vector is kept or dropped as a whole."""
    for density, epsilon in zip(arguments["density"], arguments["epsilon"]):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise ConfigError(
                f"{group.name}: density {density} and epsilon {epsilon}: expected density - epsilon above 0 and "
                f"density + epsilon below 1; give an epsilon below {min(density, 1 - density):g}"
            )


def check(group: Group, arguments: Mapping[str, Any]) -> None:
    """Weights as of task arithmetic, and the probabilities."""
    task_arithmetic.check(group, arguments)
    check_chances(group, arguments)


def unit(shape: tuple[int, ...], arguments: Mapping[str, Any]) -> int:
    """The elements of a row, unless all that there is to keep is kept or dropped as a whole."""
    return max(1, row_of(shape)) if any(0 < density < 1 for density in arguments["density"]) else 1


@method("della_linear", reference=reference, source="https://arxiv.org/abs/2406.11617", check=check, unit=unit)
def merge(
    group: Group,
    *,
    weight: PerExpert,
    density: Annotated[PerExpert, FRACTION] = 1.0,  # type: ignore[assignment]
    epsilon: Annotated[PerExpert, AT_LEAST_0] = 0.15,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Merge:
    """One pass for the L1 norms, if they are asked for, and one for the output; both rank the elements of each row.

    Args:
        weight: weight of the model's task vector.
        density: mean probability that an element of the task vector is kept.
        epsilon: how much the probability lies below it for the smallest, above it for the greatest magnitude of a row.
        normalize: divide by the sum of the weights.
        rescale: scale what is kept of each task vector to the L1 norm of the whole.
        int8_mask: accepted for mergekit's sake; masks are never stored here.
        lambda: scale of the merged task vector.
    """
    selection = by_rank(group, density, epsilon)
    yield from merge_kept(
        group, selection, elect=False, weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_
    )
