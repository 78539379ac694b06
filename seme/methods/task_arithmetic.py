"""Task arithmetic: scaled task vectors added to a base model.

``w0 + lambda * sum_i weight_i (w_i - w0)``, the sum divided by ``sum_i weight_i`` when ``normalize`` is on.
Ilharco et al. 2023, arXiv 2212.04089; parameters, defaults and order of operations as in mergekit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from seme import dtypes
from seme.dtypes import DType
from seme.methods._passes import Group, Merge
from seme.methods._registry import FRACTION, PerExpert, method
from seme.methods._weights import check_finite, check_sum
from seme.ops.task_vector_sum import OP as TASK_VECTOR_SUM

if TYPE_CHECKING:
    import torch


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    base: int,
    weight: Sequence[float],
    density: Sequence[float] = (),
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> torch.Tensor:
    """The formula in float64."""
    origin = tensors[base].double()
    experts = [t.double() for i, t in enumerate(tensors) if i != base]
    total = sum((w * (t - origin) for w, t in zip(weight, experts)), start=0 * origin)
    if normalize and abs(sum(weight)) >= 1e-8:
        total = total / sum(weight)
    return origin + lambda_ * total


def normalizer(compute: DType, weights: Sequence[float]) -> float:
    """Sum of the weights as a tensor of the compute dtype holds it; 1 if it is below 1e-8."""
    total = 0.0
    for w in weights:
        total = dtypes.round_to(dtypes.arithmetic(compute), total + dtypes.round_to(compute, w))
    total = dtypes.round_to(compute, total)
    return total if abs(total) >= 1e-8 else 1.0


def check(group: Group, arguments: Mapping[str, Any]) -> None:
    """Weights in the compute dtype, which they are rounded to; all of them 0 give the base model.

    Of weights that add up to 0 mergekit divides by 1.
    """
    check_finite(group, "weight", arguments["weight"], group.compute_dtype)
    if arguments["normalize"] and any(arguments["weight"]) and not group.compat:
        check_sum(group, arguments["weight"], group.compute_dtype)


@method("task_arithmetic", reference=reference, source="https://arxiv.org/abs/2212.04089", check=check)
def merge(
    group: Group,
    *,
    weight: PerExpert,
    density: Annotated[PerExpert, FRACTION] = 1.0,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Merge:
    """One pass.

    Args:
        weight: weight of the model's task vector.
        density: accepted for mergekit's sake; task arithmetic keeps every element.
        normalize: divide the sum of task vectors by the sum of the weights.
        rescale: accepted for mergekit's sake; without trimming there is nothing to rescale.
        int8_mask: accepted for mergekit's sake; masks are never stored here.
        lambda: scale of the merged task vector.
    """
    divisor = normalizer(group.compute_dtype, weight) if normalize else 1.0
    yield group.write(TASK_VECTOR_SUM, weights=weight, divisor=divisor, scale=lambda_)
