"""Spherical interpolation between two models, or between their task vectors, as a whole or per row or column.

With ``v0`` and ``v1`` the models (their task vectors, where there is a base model), ``theta`` the angle between them
and ``t = weight_1 / (weight_0 + weight_1)``: ``sin((1-t) theta) / sin(theta) * v0 + sin(t theta) / sin(theta) * v1``,
plus the base. Shoemake 1985; parameters and conventions are mergekit's: weights that add up to 0 give ``t = 0.5``,
and where the compute dtype cannot tell the vectors from parallel ones the interpolation is linear.

mergekit finds the angle in the compute dtype. Here it is found in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from seme import dtypes
from seme.dtypes import DType
from seme.methods._lines import WHOLE, Lines, columns, rows
from seme.methods._passes import Group, Merge
from seme.methods._registry import PerExpert, method

if TYPE_CHECKING:
    import torch

SMALL_NORM = 1e-7
COLLINEAR = 1e-16
SMALL_SUM = 1e-6


def fraction(weight: Sequence[float]) -> float:
    """How far from the first model to the second."""
    total = weight[0] + weight[1]
    return 0.5 if abs(total) < SMALL_SUM else weight[1] / total


def lines(shape: tuple[int, ...], arguments: Mapping[str, Any]) -> Lines:
    """What is a vector."""
    if arguments["nuslerp_flatten"]:
        return WHOLE
    return columns(shape, 2) if arguments["nuslerp_row_wise"] else rows(shape)


def coefficients(t: float, gram: Sequence[float], compute: DType) -> tuple[float, float]:
    """Factors of v0 and v1 from their inner products."""
    first, second = (max(math.sqrt(gram[i]), SMALL_NORM) for i in (0, 3))
    cosine = max(-1.0, min(1.0, gram[1] / first / second))
    if 1 - dtypes.round_to(compute, cosine) ** 2 <= COLLINEAR:
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    base: int | None,
    weight: Sequence[float],
    nuslerp_row_wise: bool = False,
    nuslerp_flatten: bool = True,
) -> torch.Tensor:
    """The formula in float64, the vectors along the last axis."""
    import torch

    v0, v1 = (t.double() for i, t in enumerate(tensors) if i != base)
    origin = tensors[base].double() if base is not None else torch.zeros_like(v0)
    shape = origin.shape

    def lined(x: torch.Tensor) -> torch.Tensor:
        if nuslerp_flatten or x.dim() < 2:
            return x.reshape(1, -1)
        return x.transpose(0, -1) if nuslerp_row_wise else x

    a, b = lined(v0 - origin), lined(v1 - origin)
    units = [x / x.norm(dim=-1, keepdim=True).clamp(min=SMALL_NORM) for x in (a, b)]
    theta = torch.acos((units[0] * units[1]).sum(-1, keepdim=True).clamp(-1, 1))
    t = fraction(weight)
    merged = (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)
    merged = torch.where(torch.sin(theta) < 1e-6, (1 - t) * a + t * b, merged)
    if not nuslerp_flatten and nuslerp_row_wise and len(shape) > 1:
        merged = merged.transpose(0, -1)
    return origin + merged.reshape(shape)


@method(
    "nuslerp",
    reference=reference,
    source="https://en.wikipedia.org/wiki/Slerp",
    base="optional",
    min_inputs=2,
    max_inputs=2,
    unit=lambda shape, arguments: lines(shape, arguments).unit,
)
def merge(group: Group, *, weight: PerExpert, nuslerp_row_wise: bool = False, nuslerp_flatten: bool = True) -> Merge:
    """One pass for the inner products, in float64 over fixed blocks, and one for the output.

    Args:
        weight: weight of the model.
        nuslerp_row_wise: without flattening, interpolate along the first dimension instead of the last.
        nuslerp_flatten: take a tensor for one vector; false: each row, which lies along the last dimension, for itself.
    """
    cut = lines(group.inputs[0].shape, {"nuslerp_flatten": nuslerp_flatten, "nuslerp_row_wise": nuslerp_row_wise})
    relative = group.base is not None
    order = (group.base, *group.experts) if group.base is not None else group.experts
    found = yield cut.products(group, order, relative)
    t = fraction(weight)
    weights = [coefficients(t, gram, group.compute_dtype) for gram in cut.grams(found)]
    yield cut.write(group, order, relative, weights)
