"""``S^T diag(w) S``: the second moment of selected semantic bases, weighted by their energy.

Rows of weight 0 are skipped on the CPU, so a selection of a tenth of the labels costs a tenth. The result is symmetric,
and only about half of the block products are computed.

Flops: ``v d^2`` (the symmetric half of ``2 v d^2``), v counting the rows of non-zero weight on the CPU. Least bytes:
those rows once, ``4 v d`` in float32, and ``out`` twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seme.ops._matrix import (
    MatrixOp,
    Plan,
    acc_of,
    add_upper,
    check_matrix,
    mirror_upper,
    tile_rows,
    tiles,
    working_dtype,
)
from seme.ops._op import Spec

if TYPE_CHECKING:
    import torch


def check(bases: Spec, weights: Spec, *, mirror: bool = True) -> Plan:
    """Bases [v, d] and one weight for each."""
    check_matrix("weighted_gram", "bases", bases, (None, None))
    check_matrix("weighted_gram", "weights", weights, bases.shape[:1], "for the rows of bases")
    width = bases.shape[1]
    return {"mirror": mirror}, (Spec((width, width), working_dtype(bases, weights)),)


def reference(bases: torch.Tensor, weights: torch.Tensor, *, mirror: bool) -> torch.Tensor:
    """The formula; both halves, whatever ``mirror`` says."""
    acc = acc_of(bases, weights)
    s = bases.to(acc)
    return s.T @ (weights.to(acc)[:, None] * s)


def run_cpu(bases: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, *, threads: int, mirror: bool) -> None:
    """Tiles of the rows whose weight is not 0."""
    kept = weights.nonzero()[:, 0]
    for part in tiles(len(kept), tile_rows(bases.shape[1])):
        chosen = kept[part]
        s = bases[chosen].to(out.dtype)
        add_upper(s * weights[chosen].to(out.dtype)[:, None], s, out)
    if mirror:
        mirror_upper(out)


OP = MatrixOp(
    name="weighted_gram",
    operands="Tensor bases, Tensor weights",
    results=("out",),
    arguments="bool mirror=True",
    check=check,
    reference=reference,
    cpu=run_cpu,
    accumulates=True,
)


def weighted_gram(
    bases: torch.Tensor,
    weights: torch.Tensor,
    *,
    mirror: bool = True,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Weighted Gram matrix of the columns of the bases: ``sum_i w_i s_i s_i^T``.

    Args:
        bases: [v, d], one basis a row.
        weights: [v].
        mirror: write both halves, see :func:`seme.ops.delta_gram`.
        out: [d, d] in the working dtype (float32, float64 if an operand is float64); the sum is added to it.
        backend: auto, torch, cpu or triton.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        [d, d]: ``out``, or a new tensor.

    Raises:
        OpError: shapes differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    outs = None if out is None else [out]
    result: torch.Tensor = OP(bases, weights, mirror=mirror, outs=outs, backend=backend, threads=threads)
    return result
