"""Iso-C: the sum of the task vectors with a flat spectrum.

With ``U S V^T`` the SVD of ``sum_m weight_m T_m``: ``W = W_0 + lambda * mean(S) U V^T``, so that every direction of the
common subspace counts the same. Marczak et al. 2025, arXiv 2502.04959. Directions whose singular value is what
rounding left of zero are not amplified. Linear layers and the head are matrices; embeddings, norms and biases get
the weighted mean of their task vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from seme.methods import _spectral
from seme.methods._matrix import Stack
from seme.methods._registry import PerExpert, method
from seme.roles import TensorRole

if TYPE_CHECKING:
    import torch


def combine(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """mean(S) U V^T of the sum."""
    import torch

    total = torch.stack(list(deltas)).sum(0)
    if total.numel() == 0:
        return total
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    kept = s > s.max() * max(total.shape) * torch.finfo(s.dtype).eps
    flat: torch.Tensor = (u * (kept * s.mean())) @ v
    return flat


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    base: int,
    weight: Sequence[float] = (),
    lambda_: float = 1.0,
    role: TensorRole | None = None,
    bases: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula in float64."""
    return _spectral.reference(tensors, base, weight, lambda_, role, combine)


def describe(role: TensorRole, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> str:
    """What is done with a tensor, for the plan."""
    return "isotropic" if _spectral.is_matrix(role, shape) else "mean"


@method(
    "iso_c",
    reference=reference,
    source="https://arxiv.org/abs/2502.04959",
    matrix=True,
    describe=describe,
    workspace=_spectral.workspace,
)
def merge(stack: Stack, *, weight: PerExpert = 1.0, lambda_: float = 1.0) -> None:  # type: ignore[assignment]
    """One SVD per matrix.

    Args:
        weight: weight of the model's task vector in the sum.
        lambda: scale of the merged task vector.
    """
    _spectral.merge(stack, weight, lambda_, combine)
