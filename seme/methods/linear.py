"""Weighted average of models (model soup).

``sum_i weight_i w_i``, divided by ``sum_i weight_i`` when ``normalize`` is on. Wortsman et al. 2022,
arXiv 2203.05482. As in mergekit a configured base model is one more input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from seme import dtypes
from seme.methods._passes import Group, Merge
from seme.methods._registry import PerModel, method
from seme.methods._weights import check_sum
from seme.ops.weighted_sum import OP as WEIGHTED_SUM

if TYPE_CHECKING:
    import torch


def reference(
    tensors: Sequence[torch.Tensor], *, base: int | None, weight: Sequence[float], normalize: bool = True
) -> torch.Tensor:
    """The formula in float64."""
    total = sum(w * t.double() for w, t in zip(weight, tensors))
    assert not isinstance(total, int)
    return total / sum(weight) if normalize else total


def check(group: Group, arguments: Mapping[str, Any]) -> None:
    """The sum of the weights, if it divides."""
    if arguments["normalize"]:
        check_sum(group, arguments["weight"], dtypes.arithmetic(group.compute_dtype))


@method("linear", reference=reference, source="https://arxiv.org/abs/2203.05482", base="input", check=check)
def merge(group: Group, *, weight: PerModel, normalize: bool = True) -> Merge:
    """One pass.

    Args:
        weight: weight of the model.
        normalize: divide by the sum of the weights.
    """
    divisor = 1.0
    if normalize:
        held = dtypes.arithmetic(group.compute_dtype)
        divisor = 0.0
        for w in weight:
            divisor = dtypes.round_to(held, divisor + dtypes.round_to(held, w))
    yield group.write(WEIGHTED_SUM, weights=weight, divisor=divisor)
