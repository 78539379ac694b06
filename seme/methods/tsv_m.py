"""TSV-M: the leading singular triples of every task vector, with interference between their vectors removed.

Of each of the T task vectors of a matrix the first ``r / T`` triples are kept; the left vectors of all of them,
side by side, are replaced by the nearest orthonormal set (their polar factor), the right ones as well, and
``W = W_0 + lambda * U diag(S) V^T``. Gargiulo et al. 2025, arXiv 2412.00081. Linear layers and the head are matrices;
embeddings, norms and biases get the weighted mean of their task vectors.
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


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """The polar factor: the nearest matrix with orthonormal columns."""
    import torch

    p, _, q = torch.linalg.svd(columns, full_matrices=False)
    polar: torch.Tensor = p @ q
    return polar


def combine(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """U diag(S) V^T of the whitened triples."""
    import torch

    rank = min(deltas[0].shape) // len(deltas)
    if rank == 0:  # more experts than directions: nothing to share out
        return torch.stack(list(deltas)).sum(0)
    left, values, right = [], [], []
    for delta in deltas:
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        # The vectors of singular values that are zero are arbitrary, and would push the others' aside.
        kept = min(rank, int((s > max(delta.shape) * torch.finfo(s.dtype).eps * s[0]).sum()))
        left.append(u[:, :kept])
        values.append(s[:kept])
        right.append(v[:kept].mT)
    return (_orthonormal(torch.cat(left, 1)) * torch.cat(values)) @ _orthonormal(torch.cat(right, 1)).mT


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
    return "singular vectors" if _spectral.is_matrix(role, shape) else "mean"


@method(
    "tsv_m",
    reference=reference,
    source="https://arxiv.org/abs/2412.00081",
    matrix=True,
    describe=describe,
    workspace=_spectral.workspace,
)
def merge(stack: Stack, *, weight: PerExpert = 1.0, lambda_: float = 1.0) -> None:  # type: ignore[assignment]
    """One SVD per matrix and model, two more per matrix.

    Args:
        weight: weight of the model's task vector.
        lambda: scale of the merged task vector.
    """
    _spectral.merge(stack, weight, lambda_, combine)
