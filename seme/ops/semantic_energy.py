"""``s_i^T M s_i`` for every label: the energy of a second moment along each semantic basis.

With ``M = T^T T / ||T||_F^2`` it is the mean squared cosine projection of the task vector's rows onto the basis of
label i. The [v, d] product ``S M`` is never stored whole.

Flops: ``2 v d^2`` for any M; the CPU folds M onto its upper half, since only ``M + M^T`` counts, and does with about
``v d^2``. Least bytes: the bases twice, ``8 v d`` in float32, and M once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seme.ops._matrix import (
    MatrixOp,
    Plan,
    acc_of,
    block_of,
    check_matrix,
    tile_rows,
    tiles,
    working_dtype,
    workspace,
)
from seme.ops._op import Spec

if TYPE_CHECKING:
    import torch


def check(bases: Spec, moment: Spec) -> Plan:
    """Bases [v, d] and a moment [d, d]."""
    check_matrix("semantic_energy", "bases", bases, (None, None))
    width = bases.shape[1]
    check_matrix("semantic_energy", "moment", moment, (width, width), "for the columns of bases")
    return {}, (Spec(bases.shape[:1], working_dtype(bases, moment)),)


def reference(bases: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """The formula."""
    acc = acc_of(bases, moment)
    s = bases.to(acc)
    return ((s @ moment.to(acc)) * s).sum(1)


def run_cpu(bases: torch.Tensor, moment: torch.Tensor, out: torch.Tensor, *, threads: int) -> None:
    """Label tiles against the folded moment."""
    count, width = bases.shape
    acc, step = out.dtype, tile_rows(width)
    memory = workspace(min(count, step), width, acc)
    folded = moment.to(acc, copy=True)
    blocks = list(tiles(width, block_of(width)))
    for block in blocks:
        folded[: block.start, block] += moment[block, : block.start].T.to(acc)
    for part in tiles(count, step):
        s = bases[part].to(acc)
        product = memory[: s.numel()].view(s.shape)
        for block in blocks:
            product[:, block].addmm_(s[:, : block.stop], folded[: block.stop, block], beta=0)
        out[part] = product.mul_(s).sum(1)


OP = MatrixOp(
    name="semantic_energy",
    operands="Tensor bases, Tensor moment",
    results=("out",),
    arguments="",
    check=check,
    reference=reference,
    cpu=run_cpu,
)


def semantic_energy(
    bases: torch.Tensor,
    moment: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Energy of a second moment along each semantic basis: ``s_i^T M s_i``.

    Args:
        bases: [v, d], one basis a row.
        moment: [d, d].
        out: [v] in the working dtype (float32, float64 if an operand is float64), overwritten.
        backend: auto, torch, cpu or triton.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        [v]: ``out``, or a new tensor.

    Raises:
        OpError: shapes differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    outs = None if out is None else [out]
    result: torch.Tensor = OP(bases, moment, outs=outs, backend=backend, threads=threads)
    return result
