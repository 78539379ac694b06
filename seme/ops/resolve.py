"""The k labels nearest to each latent vector, its coefficients on their bases, and what these leave over.

Selection: the k bases of largest ``|<r, s_i>|``, which for unit bases is the order of ``|cosine|``; of equal ones the
lowest label first. Erasure: orthogonal matching pursuit's projection, the bases taken in that order; so the
coefficients are the joint least squares solution ``argmin_c ||r - sum_j c_j s_j||``, and the residual is orthogonal to
every selected basis. A basis that depends on those before it (the square of its distance to their span is at most
``dependent`` times the square of its norm: 1e-5 in float32, 1e-12 in float64) gets coefficient 0.

Nothing of size [N, v] is stored. Flops: ``2 N v d`` for the selection, about ``N k (k + 6) d`` for the erasure. Least
bytes: the vectors twice, and the bases once for each block of vectors. On the CPU the selection goes through all scores
in 16-bit integers and computes again, in the working dtype, those that may be among the k best by a strict bound of
what was rounded away; so it finds what the full scores would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seme import native
from seme.dtypes import float64
from seme.errors import OpError
from seme.ops._matrix import (
    MatrixOp,
    Plan,
    acc_of,
    by_rows,
    check_matrix,
    raw,
    tiles,
    working_dtype,
)
from seme.ops._op import Spec
from seme.ops._task_vectors import INT64

if TYPE_CHECKING:
    import torch

MOST = 64
"""Greatest k."""
ROWS = 2048
"""Vectors at a time on the CPU."""


def check(vectors: Spec, bases: Spec, *, k: int) -> Plan:
    """Vectors and bases of one width, k labels of v."""
    check_matrix("resolve", "vectors", vectors, (None, None))
    check_matrix("resolve", "bases", bases, (None, vectors.shape[1]), "for the columns of vectors")
    if not 1 <= k <= MOST:
        raise OpError(f"resolve: k is {k}, expected 1 to {MOST}")
    if k > bases.shape[0]:
        raise OpError(f"resolve: k is {k}, but bases has only {bases.shape[0]} rows")
    acc = working_dtype(vectors, bases)
    count = vectors.shape[0]
    results = (Spec((count, k), INT64), Spec((count, k), acc), Spec(vectors.shape, acc))
    return {"k": int(k), "dependent": 1e-12 if acc == float64 else 1e-5}, results


def reference(
    vectors: torch.Tensor, bases: torch.Tensor, *, k: int, dependent: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All dot products, a stable sort, then one basis after the other made orthogonal to those before it."""
    acc = acc_of(vectors, bases)
    r, s = vectors.to(acc), bases.to(acc)
    labels = (r @ s.T).abs().argsort(dim=1, descending=True, stable=True)[:, :k]
    coefficients, residual = erase(r, s[labels], dependent)
    return labels, coefficients, residual


def erase(vectors: torch.Tensor, chosen: torch.Tensor, dependent: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients [N, k] of ``vectors`` [N, d] on ``chosen`` [N, k, d], and the residual [N, d]."""
    import torch

    count, k, _ = chosen.shape
    residual = vectors.clone()
    q = torch.zeros_like(chosen)
    upper = chosen.new_zeros(count, k, k)
    along = chosen.new_zeros(count, k)
    for j in range(k):
        own = rest = chosen[:, j]
        for _ in range(2):  # Gram-Schmidt twice is orthogonal to rounding
            share = torch.einsum("nkd,nd->nk", q, rest)
            rest = rest - torch.einsum("nk,nkd->nd", share, q)
            upper[:, :, j] += share
        norm = rest.square().sum(1)
        new = norm > dependent * own.square().sum(1)
        norm = torch.where(new, norm, 1.0).sqrt()
        upper[:, j, j] = norm
        q[:, j] = torch.where(new[:, None], rest / norm[:, None], 0.0)
        along[:, j] = (q[:, j] * residual).sum(1)
        residual = residual - along[:, j, None] * q[:, j]
    return torch.linalg.solve_triangular(upper, along[:, :, None], upper=True)[:, :, 0], residual


def run_cpu(
    vectors: torch.Tensor,
    bases: torch.Tensor,
    labels: torch.Tensor,
    coefficients: torch.Tensor,
    residual: torch.Tensor,
    *,
    threads: int,
    k: int,
    dependent: float,
) -> None:
    """Selection and least squares in C++, block by block of vectors."""
    import torch

    frame = by_rows(bases)
    for rows in tiles(len(vectors), ROWS):
        r = by_rows(vectors[rows].to(coefficients.dtype))
        scores, found = r.new_empty(len(r), k), torch.empty(len(r), k, dtype=torch.int64)
        nearest(r, frame, scores, found, threads)
        rest = residual[rows]
        target = rest if rest.stride(1) == 1 else r.new_empty(rest.shape)
        native.module().erase(raw(r), raw(frame), raw(scores), integers(found), dependent, raw(target), threads)
        labels[rows], coefficients[rows] = found, scores
        if target is not rest:
            rest.copy_(target)


def nearest(
    vectors: torch.Tensor, bases: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threads: int
) -> None:
    """Scores and labels [N, k] of the nearest bases, in no order; all operands by rows. ``csrc/cpu/nearest.cpp``."""
    native.module().nearest(raw(vectors), raw(bases), raw(scores), integers(labels), threads)


def integers(labels: torch.Tensor) -> tuple[int, int, int]:
    """Labels as the compiled module takes them."""
    return labels.data_ptr(), labels.numel(), INT64.native


OP = MatrixOp(
    name="resolve",
    operands="Tensor vectors, Tensor bases",
    results=("labels", "coefficients", "residual"),
    arguments="int k",
    check=check,
    reference=reference,
    cpu=run_cpu,
    cuda=True,
)


def resolve(
    vectors: torch.Tensor,
    bases: torch.Tensor,
    *,
    k: int,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Resolve latent vectors into the k semantic bases nearest to them.

    Args:
        vectors: [N, d], one latent vector a row.
        bases: [v, d], one unit basis a row (a zero row is never worth more than coefficient 0).
        k: labels per vector, 1 to 64, at most v.
        out: the three results, overwritten.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        ``labels``, int64 [N, k], by falling ``|cosine|``, of equal ones the lowest first; ``coefficients`` [N, k] and
        ``residual`` [N, d] in the working dtype (float32, float64 if an operand is float64), so that
        ``vectors = coefficients @ bases[labels] + residual`` row by row.

    Raises:
        OpError: shapes differ, a dtype is not one of the four, or k does not fit.
        BackendError: the backend does not work here.
    """
    labels, coefficients, residual = OP(vectors, bases, k=k, outs=out, backend=backend, threads=threads)
    return labels, coefficients, residual
