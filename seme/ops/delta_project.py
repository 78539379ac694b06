"""``T @ M`` of a task vector ``T = tensor - base``: the right-hand side of the solve of rule ``project``.

``W - W_0 = lambda (sum_m T_m C_m) (sum_k C_k)^-1``: this op adds up the first factor, expert by expert, without a
copy of ``T``.

Flops: ``2 r in^2``. Least bytes: base and tensor once, ``4 r in`` in bfloat16, the matrix once, ``out`` twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seme.ops._matrix import (
    MatrixOp,
    Plan,
    acc_of,
    check_matrix,
    task_vectors,
    tile_rows,
    tiles,
    working_dtype,
    workspace,
)
from seme.ops._op import Spec

if TYPE_CHECKING:
    import torch


def check(base: Spec, tensor: Spec, matrix: Spec) -> Plan:
    """Two matrices of one shape, and a square one of their width."""
    check_matrix("delta_project", "base", base, (None, None))
    check_matrix("delta_project", "tensor", tensor, base.shape, "as base has")
    width = base.shape[1]
    check_matrix("delta_project", "matrix", matrix, (width, width), "for the columns of base")
    return {}, (Spec(base.shape, working_dtype(base, tensor, matrix)),)


def reference(base: torch.Tensor, tensor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The formula."""
    acc = acc_of(base, tensor, matrix)
    return (tensor.to(acc) - base.to(acc)) @ matrix.to(acc)


def run_cpu(base: torch.Tensor, tensor: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, *, threads: int) -> None:
    """Row tiles of T in C++, products by torch."""
    rows, width = base.shape
    step = tile_rows(width)
    memory = workspace(min(rows, step), width, out.dtype)
    factor = matrix.to(out.dtype)
    for part in tiles(rows, step):
        out[part].addmm_(task_vectors(base[part], [tensor[part]], memory, threads), factor)


OP = MatrixOp(
    name="delta_project",
    operands="Tensor base, Tensor tensor, Tensor matrix",
    results=("out",),
    arguments="",
    check=check,
    reference=reference,
    cpu=run_cpu,
    accumulates=True,
)


def delta_project(
    base: torch.Tensor,
    tensor: torch.Tensor,
    matrix: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """A task vector times a matrix: ``(tensor - base) @ matrix``.

    Args:
        base: the base model's matrix [r, in] (or some rows of it), of any strides.
        tensor: the expert's matrix, of the same shape.
        matrix: [in, in].
        out: [r, in] in the working dtype (float32, float64 if an input is float64); the product is added to it.
        backend: auto, torch, cpu or triton.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        [r, in]: ``out``, or a new tensor.

    Raises:
        OpError: shapes differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    outs = None if out is None else [out]
    result: torch.Tensor = OP(base, tensor, matrix, outs=outs, backend=backend, threads=threads)
    return result
