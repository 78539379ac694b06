"""Karcher mean: the point of the unit sphere nearest to the directions of the models, at their mean length.

With the models' directions ``u_i = w_i / |w_i|``, start at ``m``, their normalised mean, and repeat: in the tangent
space of m, the mean of the logarithms ``theta_i / sin(theta_i) (u_i - cos(theta_i) m)`` with ``theta_i`` the angle
between ``u_i`` and m; stop if it is shorter than ``tol``, else follow it along the sphere, ``m = cos(n) m + sin(n) /
n * it`` with n its length. The result is m times the mean of the ``|w_i|``. Karcher 1977; parameters and conventions
are mergekit's: all models weigh the same, those shorter than ``tol`` have no direction, a direction nearer to m than
``tol`` adds nothing, and a configured base model is one more input.

m stays in the span of the models, so the iteration is on its coefficients and the models' inner products, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from seme.methods._lines import WHOLE
from seme.methods._passes import Group, Merge
from seme.methods._registry import AT_LEAST_0, method

if TYPE_CHECKING:
    import torch


def coefficients(gram: Sequence[float], count: int, max_iter: int, tol: float) -> list[float]:
    """Of every model in the result, from the models' inner products."""
    norms = [math.sqrt(gram[i * (count + 1)]) for i in range(count)]
    valid = [i for i in range(count) if norms[i] > tol]
    found = [0.0] * count
    if not valid:
        return found
    units = [[gram[i * count + j] / norms[i] / norms[j] for j in valid] for i in valid]

    def dots(x: Sequence[float]) -> list[float]:
        return [math.fsum(u * v for u, v in zip(row, x)) for row in units]

    def norm(x: Sequence[float]) -> float:
        return math.sqrt(max(0.0, math.fsum(a * b for a, b in zip(x, dots(x)))))

    alpha = 1 / len(valid)
    mean = [alpha] * len(valid)
    length = norm(mean)
    mean = [c / length for c in mean] if length >= tol else [1.0] + [0.0] * (len(valid) - 1)
    for _ in range(max_iter):
        tangent = [0.0] * len(valid)
        for i, dot in enumerate(dots(mean)):
            cosine = max(-1.0, min(1.0, dot))
            theta = math.acos(cosine)
            if theta < tol or math.pi - theta < tol:  # there, or opposite, where no direction is the shortest
                continue
            step = alpha * theta / math.sin(theta)
            tangent = [c - step * cosine * m for c, m in zip(tangent, mean)]
            tangent[i] += step
        length = norm(tangent)
        if length < tol or length == 0:
            break
        mean = [math.cos(length) * m + math.sin(length) / length * c for m, c in zip(mean, tangent)]
        length = norm(mean)
        if length > tol:
            mean = [m / length for m in mean]
    scale = math.fsum(norms) / count
    for i, c in zip(valid, mean):
        found[i] = scale * c / norms[i]
    return found


def reference(
    tensors: Sequence[torch.Tensor], *, base: int | None, max_iter: int = 10, tol: float = 1e-5
) -> torch.Tensor:
    """The iteration in float64, on the vectors themselves."""
    import torch

    vectors = [t.double() for t in tensors]
    units = [v / v.norm() for v in vectors if v.norm() > tol]
    if not units:
        return torch.zeros_like(vectors[0])
    mean = torch.stack(units).mean(0)
    mean = mean / mean.norm() if mean.norm() >= tol else units[0]
    for _ in range(max_iter):
        tangent = torch.zeros_like(mean)
        for unit in units:
            cosine = (unit * mean).sum().clamp(-1, 1)
            theta = torch.acos(cosine)
            if tol <= theta <= math.pi - tol:
                tangent = tangent + theta / torch.sin(theta) * (unit - cosine * mean) / len(units)
        length = tangent.norm()
        if length < tol:
            break
        mean = torch.cos(length) * mean + torch.sin(length) / length * tangent
        mean = mean / mean.norm()
    merged: torch.Tensor = torch.stack([v.norm() for v in vectors]).mean() * mean
    return merged


@method("karcher", reference=reference, source="https://arxiv.org/abs/2603.04972", base="input")
def merge(
    group: Group, *, max_iter: Annotated[int, AT_LEAST_0] = 10, tol: Annotated[float, AT_LEAST_0] = 1e-5
) -> Merge:
    """One pass for the inner products, in float64 over fixed blocks, and one for the output.

    Args:
        max_iter: at most as many steps.
        tol: lengths and angles, in radians, that count as 0.
    """
    count = len(group.inputs)
    order = range(count)
    if count == 1:
        yield WHOLE.write(group, order, False, [[1.0]])
        return
    found = yield WHOLE.products(group, order, relative=False)
    yield WHOLE.write(group, order, False, [coefficients(WHOLE.grams(found)[0], count, max_iter, tol)])
