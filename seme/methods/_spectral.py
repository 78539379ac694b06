"""What the methods on singular vectors share: which tensors they treat as matrices, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from seme.methods._matrix import Stack
from seme.roles import Role, TensorRole

if TYPE_CHECKING:
    import torch

Combine = Callable[[Sequence["torch.Tensor"]], "torch.Tensor"]
"""From the weighted task vectors of a matrix, [out, in] each, the merged one."""


def is_matrix(role: TensorRole, shape: tuple[int, ...]) -> bool:
    """True for linear layers and heads; embeddings, norms and biases are averaged."""
    return len(shape) - role.batch >= 2 and role.role not in (Role.NORM, Role.BIAS, Role.VOCABULARY)


def workspace(role: TensorRole, shape: tuple[int, ...], experts: int, arguments: Mapping[str, Any]) -> int:
    """Bytes held for one tensor: the task vectors in float32, their factors and what LAPACK asks for."""
    if not is_matrix(role, shape):
        return 0
    rows, columns = shape[role.batch], prod(shape[role.batch + 1 :])
    return 4 * (experts * rows * columns + 8 * rows * columns)


def merge(stack: Stack, weight: Sequence[float], scale: float, combine: Combine) -> None:
    """base + scale * combine(weighted task vectors that are not zero) for matrices; the weighted mean for the rest."""
    if not is_matrix(stack.role, stack.shape):
        stack.mean(weight, scale)
        return
    for matrix in stack.matrices():
        deltas = [matrix.delta(m) * w for m, w in zip(stack.group.experts, weight) if w]
        deltas = [t for t in deltas if t.any()]
        matrix.add(combine(deltas) if deltas else matrix.zeros(matrix.out, matrix.width), scale)


def reference(
    tensors: Sequence[torch.Tensor],
    base: int,
    weight: Sequence[float],
    scale: float,
    role: TensorRole | None,
    combine: Combine,
) -> torch.Tensor:
    """The same in float64 on whole tensors."""
    role = role or TensorRole(Role.OTHER)
    origin = tensors[base].double()
    deltas = [w * (t.double() - origin) for w, t in zip(weight, (t for i, t in enumerate(tensors) if i != base))]
    if not is_matrix(role, tuple(origin.shape)):
        return origin + scale * sum(deltas, start=0 * origin) / sum(weight)
    shape = (-1, origin.shape[role.batch], prod(origin.shape[role.batch + 1 :]))
    problems = zip(*(t.reshape(shape) for t in deltas))
    import torch

    moved = [[t for t in p if t.any()] for p in problems]
    found = [combine(p) if p else torch.zeros(shape[1:], dtype=torch.float64) for p in moved]
    return origin + scale * torch.stack(found).reshape(origin.shape)
