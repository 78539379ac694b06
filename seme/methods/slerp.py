"""Spherical linear interpolation from the base model to one other model.

With ``v0`` the base, ``v1`` the other model, each tensor flattened, and ``theta`` the angle between them:
``sin((1-t) theta) / sin(theta) * v0 + sin(t theta) / sin(theta) * v1``. Where ``|cos theta| > 0.9995`` the
interpolation is linear, ``(1-t) v0 + t v1``. Shoemake 1985; threshold and conventions as in mergekit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme.methods._passes import Group, Merge
from seme.methods._registry import method
from seme.ops.inner_products import OP as INNER_PRODUCTS
from seme.ops.weighted_sum import OP as WEIGHTED_SUM

if TYPE_CHECKING:
    import torch

COLLINEAR = 0.9995
SMALL_NORM = 1e-8


def coefficients(t: float, dot: float, square0: float, square1: float) -> tuple[float, float]:
    """Factors of v0 and v1 from their inner product and squared norms."""
    norms = [math.sqrt(s) if math.sqrt(s) > SMALL_NORM else 1.0 for s in (square0, square1)]
    cosine = max(-1.0, min(1.0, dot / norms[0] / norms[1]))
    if abs(cosine) > COLLINEAR or math.isnan(cosine):
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def reference(tensors: Sequence[torch.Tensor], *, base: int, t: float) -> torch.Tensor:
    """The formula in float64."""
    v0, v1 = tensors[base].double(), tensors[1 - base].double()
    c0, c1 = coefficients(t, float((v0 * v1).sum()), float((v0 * v0).sum()), float((v1 * v1).sum()))
    return c0 * v0 + c1 * v1


@method("slerp", reference=reference, source="https://en.wikipedia.org/wiki/Slerp", min_inputs=2, max_inputs=2)
def merge(group: Group, *, t: float) -> Merge:
    """One pass for the inner products, in float64 over fixed blocks, and one for the output.

    Args:
        t: 0 gives the base model, 1 the other one.
    """
    assert group.base is not None
    order = (group.base, 1 - group.base)
    products = yield group.reduce(INNER_PRODUCTS, order)
    # fsum is exact, so the sum over blocks does not depend on how they were computed.
    square0, dot, _, square1 = (math.fsum(products.data[i::4]) for i in range(4))
    c0, c1 = coefficients(t, dot, square0, square1)
    yield group.write(WEIGHTED_SUM, order, weights=(c0, c1))
