"""DARE: random parts of task vectors, scaled up to the L1 norm of the whole, added to a base model.

Of every task vector each element is kept with a probability of ``density``, independently of the others; what is kept
is multiplied by ``|d|_1 / |kept d|_1`` (``rescale``); ``w0 + lambda * sum_i weight_i`` of that. Yu et al. 2024, arXiv
2311.03099, who scale by ``1 / density``, from which the L1 norms deviate at random.

Parameters, defaults and order of operations are mergekit's. An element draws a number that depends on the seed, the
tensor's name, the model's place in the recipe and the element's index alone (:mod:`seme.ops._philox`), so the same
recipe gives the same model on every device. mergekit draws from one generator, tensor after tensor: statistics agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from seme.methods._passes import Group, Merge
from seme.methods._registry import FRACTION, PerExpert, method
from seme.methods._sparse import by_chance, chance, merge_kept, stream
from seme.methods._sparse import reference as merged
from seme.methods.task_arithmetic import check

if TYPE_CHECKING:
    import torch


def parts(
    tensors: Sequence[torch.Tensor], base: int, density: Sequence[float], name: str, seed: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Task vectors in float64 and masks of what is kept of them."""
    from seme.ops._philox import numbers

    origin = tensors[base].double()
    found = []
    for i, d in zip((i for i in range(len(tensors)) if i != base), density):
        delta = tensors[i].double() - origin
        mask = numbers(stream(name, i, seed), 0, delta.numel()) < chance(d)
        found.append((delta, mask.reshape(delta.shape)))
    return found


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
        elect=False,
        weight=weight,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
    )


@method("dare_linear", reference=reference, source="https://arxiv.org/abs/2311.03099", check=check)
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
        normalize: divide by the sum of the weights.
        rescale: scale what is kept of each task vector to the L1 norm of the whole.
        int8_mask: accepted for mergekit's sake; masks are never stored here.
        lambda: scale of the merged task vector.
    """
    selection = by_chance(group, density)
    yield from merge_kept(
        group, selection, elect=False, weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_
    )
