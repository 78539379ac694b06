"""TIES: trim task vectors, elect a sign per element, average the models that agree with it.

For every task vector ``d_i = w_i - w0``: keep its ``density`` largest magnitudes and zero the rest; weight it;
elect ``sign(sum_i weight_i d_i)``, where 0 votes plus; add what agrees with the elected sign and divide by the
weights that agree (``normalize``); ``w0 + lambda *`` that. Yadav et al. 2023, arXiv 2306.01708.

Parameters, defaults and order of operations are mergekit's: trimming is per tensor, weights come before the
election. Among equal magnitudes at the threshold those of lowest index are kept, so exactly
``max(1, int(density * numel))`` elements remain; mergekit leaves the choice among them to an unstable sort.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from seme.methods._passes import Group, Merge
from seme.methods._registry import FRACTION, PerExpert, method
from seme.methods._sparse import by_magnitude, merge_kept
from seme.methods._sparse import reference as merged
from seme.methods._weights import check_finite

if TYPE_CHECKING:
    import torch


def kept_count(density: float, numel: int) -> int:
    """How many elements a density keeps: at least one of a nonempty tensor, but none at 0, as in mergekit."""
    return numel if density >= 1 else max(1, int(density * numel)) if density > 0 else 0


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    base: int,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool = True,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> torch.Tensor:
    """The paper's three steps in float64, with a sort for the trim."""
    import torch

    origin = tensors[base].double()
    kept = []
    for tensor, d in zip((t for i, t in enumerate(tensors) if i != base), density):
        delta = tensor.double() - origin
        order = torch.sort(delta.abs().reshape(-1), descending=True, stable=True).indices
        mask = torch.zeros(delta.numel(), dtype=torch.bool)
        mask[order[: kept_count(d, delta.numel())]] = True
        kept.append((delta, mask.reshape(delta.shape)))
    return merged(origin, kept, elect=True, weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_)


def check(group: Group, arguments: Mapping[str, Any]) -> None:
    """Weights in the compute dtype. Those that agree may add up to 0: then the op divides by 1, as mergekit does."""
    check_finite(group, "weight", arguments["weight"], group.compute_dtype)


@method("ties", reference=reference, source="https://arxiv.org/abs/2306.01708", check=check)
def merge(
    group: Group,
    *,
    weight: PerExpert,
    density: Annotated[PerExpert, FRACTION] = 1.0,  # type: ignore[assignment]
    normalize: bool = True,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Merge:
    """A sample, one pass for the thresholds (rarely more), one for the output.

    Args:
        weight: weight of the model's task vector; a negative one turns its vote around.
        density: share of the task vector's elements that is kept, per tensor.
        normalize: divide by the sum of the weights that agree with the elected sign.
        rescale: scale each trimmed task vector back to the L1 norm it had.
        int8_mask: accepted for mergekit's sake; masks are never stored here.
        lambda: scale of the merged task vector.
    """
    selection = yield from by_magnitude(group, [kept_count(d, group.numel) for d in density])
    yield from merge_kept(
        group, selection, elect=True, weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_
    )
