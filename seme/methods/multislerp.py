"""Multi-SLERP: interpolates the directions of any number of models, or of their task vectors, at their mean length.

With ``v_i`` the models (their task vectors, where there is a base model), ``u_i = v_i / (|v_i| + eps)`` and ``m =
sum_i weight_i u_i``, normalised: ``T = sum_i weight_i (u_i - <u_i, m> m)`` is followed from m along the sphere,
``(cos(n) m + sin(n) / n * T) sum_i weight_i |v_i|`` with ``n = |T| + eps``, plus the base. Goddard 2024 (the source
below); parameters and conventions are mergekit's.

T adds up to 0, because m has the direction of ``sum_i weight_i u_i``; so the result is ``cos(eps) m sum_i weight_i
|v_i|``, and T, which in mergekit is what rounding leaves of it, is not computed. Where m has no direction, for two
models as in mergekit the result is ``sum_i weight_i v_i``; so it is for more than two, which mergekit refuses, as it
does for a tensor that no model has changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from seme import dtypes
from seme.methods._lines import WHOLE
from seme.methods._passes import Group, Merge
from seme.methods._registry import AT_LEAST_0, PerExpert, method
from seme.methods._weights import check_finite, check_sum

if TYPE_CHECKING:
    import torch

ROUNDED = 1e-7
"""A mean of unit vectors this short, relative to the weights, is what rounding left of zero."""


def coefficients(gram: Sequence[float], weight: Sequence[float], eps: float) -> list[float]:
    """Of every model (task vector) in the result, from their inner products."""
    count = len(weight)
    norms = [math.sqrt(gram[i * (count + 1)]) for i in range(count)]
    units = [w / (norm + eps) if norm else 0.0 for w, norm in zip(weight, norms)]
    square = math.fsum(units[i] * units[j] * gram[i * count + j] for i in range(count) for j in range(count))
    length = math.sqrt(max(0.0, square))
    if length < max(eps, ROUNDED * math.fsum(map(abs, weight))):
        return list(weight)
    scale = math.cos(eps) * math.fsum(w * norm for w, norm in zip(weight, norms)) / length
    return [scale * u for u in units]


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    base: int | None,
    weight: Sequence[float],
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> torch.Tensor:
    """The formula in float64, T included."""
    import torch

    vectors = [t.double() for i, t in enumerate(tensors) if i != base]
    if len(vectors) == 1:
        return vectors[0]
    origin = tensors[base].double() if base is not None else torch.zeros_like(vectors[0])
    vectors = [v - origin for v in vectors]
    weights = [w / sum(weight) if normalize_weights else w for w in weight]
    units = [v / (v.norm() + eps) for v in vectors]
    mean = torch.stack([w * u for w, u in zip(weights, units)]).sum(0)
    if mean.norm() < max(eps, ROUNDED):
        return origin + torch.stack([w * v for w, v in zip(weights, vectors)]).sum(0)
    mean = mean / mean.norm()
    tangent = torch.stack([w * (u - (u * mean).sum() * mean) for w, u in zip(weights, units)]).sum(0)
    n = tangent.norm() + eps
    scale = torch.stack([w * v.norm() for w, v in zip(weights, vectors)]).sum()
    merged: torch.Tensor = origin + (torch.cos(n) * mean + torch.sin(n) / n * tangent) * scale
    return merged


def check(group: Group, arguments: Mapping[str, Any]) -> None:
    """Weights in the compute dtype, which they are rounded to, and their sum, if it divides."""
    check_finite(group, "weight", arguments["weight"], group.compute_dtype)
    if arguments["normalize_weights"] and len(group.experts) > 1:
        check_sum(group, arguments["weight"], group.compute_dtype, "normalize_weights")


@method(
    "multislerp",
    reference=reference,
    source="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    base="optional",
    check=check,
)
def merge(
    group: Group,
    *,
    weight: PerExpert,
    normalize_weights: bool = True,
    eps: Annotated[float, AT_LEAST_0] = 1e-8,
) -> Merge:
    """One pass for the inner products, in float64 over fixed blocks, and one for the output.

    Args:
        weight: weight of the model; of a single one it does not matter.
        normalize_weights: divide the weights by their sum.
        eps: added to the lengths that are divided by; a mean that is shorter has no direction.
    """
    if len(group.experts) == 1:
        yield WHOLE.write(group, group.experts, False, [[1.0]])
        return
    rounded = [dtypes.round_to(group.compute_dtype, w) for w in weight]
    if normalize_weights:
        rounded = [w / math.fsum(rounded) for w in rounded]
    relative = group.base is not None
    order = (group.base, *group.experts) if group.base is not None else group.experts
    found = yield WHOLE.products(group, order, relative)
    yield WHOLE.write(group, order, relative, [coefficients(WHOLE.grams(found)[0], rounded, eps)])
