"""Model Stock: the average of the models, moved towards the base as far as the angles of their task vectors say.

With K models, their average ``a`` and ``cos`` the mean over all pairs of the cosine between two task vectors: ``t = K
cos / (1 + (K - 1) cos)`` and ``t a + (1 - t) w0``, which is computed as ``w0 + sum_i (t / K) (w_i - w0)``. Jang et
al. 2024, arXiv 2403.19522. ``t`` is 0 where the denominator is below 1e-6.

mergekit divides the inner product of two task vectors by at least 1e-6, so that the cosine of short ones, as rows of
light fine-tunes are, comes out too small and their models hardly count. Here the cosine is that of any vectors but
zero ones; ``compat: mergekit`` divides as mergekit does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from seme.methods._lines import WHOLE, Lines, rows
from seme.methods._passes import Group, Merge
from seme.methods._registry import method

if TYPE_CHECKING:
    import torch

LEAST = 1e-6
"""Below this a denominator is 0."""


def lines(shape: tuple[int, ...], arguments: Mapping[str, Any]) -> Lines:
    """What is a vector."""
    return rows(shape) if arguments["filter_wise"] else WHOLE


def ratio(gram: Sequence[float], count: int, least: float) -> float:
    """t, from the inner products of the task vectors. ``least``: the smallest product of two norms to divide by."""
    norms = [math.sqrt(gram[i * (count + 1)]) for i in range(count)]
    total = 0.0
    for i in range(count):
        for j in range(i + 1, count):
            divisor = max(norms[i] * norms[j], least)
            if divisor > 0:
                total += max(-1.0, min(1.0, gram[i * count + j] / divisor))
    cosine = total / (count * (count - 1) // 2)
    denominator = 1 + (count - 1) * cosine
    return 0.0 if abs(denominator) < LEAST else count * cosine / denominator


def reference(tensors: Sequence[torch.Tensor], *, base: int, filter_wise: bool = False) -> torch.Tensor:
    """The formula in float64, the vectors along the last axis."""
    import torch

    origin = tensors[base].double()
    whole = not filter_wise or origin.dim() < 2
    deltas = [t.double() - origin for i, t in enumerate(tensors) if i != base]
    vectors = [d.reshape(1, -1) if whole else d for d in deltas]
    cosines = [
        torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=0).nan_to_num(0.0)
        for i, a in enumerate(vectors)
        for b in vectors[i + 1 :]
    ]
    cosine = torch.stack(cosines).mean(0).unsqueeze(-1)
    count = len(deltas)
    denominator = 1 + (count - 1) * cosine
    t = torch.where(denominator.abs() < LEAST, 0.0, count * cosine / denominator)
    average = torch.stack(vectors).mean(0)
    return origin + (t * average).reshape(origin.shape)


@method(
    "model_stock",
    reference=reference,
    source="https://arxiv.org/abs/2403.19522",
    min_inputs=3,
    unit=lambda shape, arguments: lines(shape, arguments).unit,
)
def merge(group: Group, *, filter_wise: bool = False) -> Merge:
    """One pass for the inner products, in float64 over fixed blocks, and one for the output.

    Args:
        filter_wise: an angle for each row of a tensor, along the last dimension, instead of one for the tensor.
    """
    assert group.base is not None
    cut, count = lines(group.inputs[0].shape, {"filter_wise": filter_wise}), len(group.experts)
    order = (group.base, *group.experts)
    found = yield cut.products(group, order, relative=True)
    least = LEAST if group.compat else 0.0
    weights = [[ratio(gram, count, least) / count] * count for gram in cut.grams(found)]
    yield cut.write(group, order, True, weights)
