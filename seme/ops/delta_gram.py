"""``T^T T`` of a task vector ``T = tensor - base``: the second moment of its rows, ``select`` of rule ``project``.

Gradients are sums of output error x input, so the row space of ``T`` is an image of the inputs seen in fine-tuning.
The trace is ``||T||_F^2``. The result is symmetric, so only about half of the block products are computed.

Flops: ``r in^2`` (the symmetric half of ``2 r in^2``). Least bytes: base and tensor once, ``4 r in`` in bfloat16, and
``out`` twice.
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
    task_vectors,
    tile_rows,
    tiles,
    working_dtype,
    workspace,
)
from seme.ops._op import Spec

if TYPE_CHECKING:
    import torch


def check(base: Spec, tensor: Spec, *, mirror: bool = True) -> Plan:
    """Two matrices of one shape."""
    check_matrix("delta_gram", "base", base, (None, None))
    check_matrix("delta_gram", "tensor", tensor, base.shape, "as base has")
    width = base.shape[1]
    return {"mirror": mirror}, (Spec((width, width), working_dtype(base, tensor)),)


def reference(base: torch.Tensor, tensor: torch.Tensor, *, mirror: bool) -> torch.Tensor:
    """The formula; both halves, whatever ``mirror`` says."""
    acc = acc_of(base, tensor)
    delta = tensor.to(acc) - base.to(acc)
    return delta.T @ delta


def run_cpu(base: torch.Tensor, tensor: torch.Tensor, out: torch.Tensor, *, threads: int, mirror: bool) -> None:
    """Row tiles of T in C++, block rows of the upper half by torch."""
    rows, width = base.shape
    step = tile_rows(width)
    memory = workspace(min(rows, step), width, out.dtype)
    for part in tiles(rows, step):
        delta = task_vectors(base[part], [tensor[part]], memory, threads)
        add_upper(delta, delta, out)
    if mirror:
        mirror_upper(out)


OP = MatrixOp(
    name="delta_gram",
    operands="Tensor base, Tensor tensor",
    results=("out",),
    arguments="bool mirror=True",
    check=check,
    reference=reference,
    cpu=run_cpu,
    accumulates=True,
)


def delta_gram(
    base: torch.Tensor,
    tensor: torch.Tensor,
    *,
    mirror: bool = True,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Gram matrix of the columns of a task vector: ``(tensor - base)^T (tensor - base)``.

    Args:
        base: the base model's matrix [r, in] (or some rows of it), of any strides.
        tensor: the expert's matrix, of the same shape; bfloat16, float16, float32, float64, mixed as you like.
        mirror: write both halves. False leaves what lies below the diagonal of ``out`` undefined (some of it is
            written); over several row chunks, the last call alone needs to mirror.
        out: [in, in] in the working dtype (float32, float64 if an input is float64); the products are added to it.
        backend: auto, torch, cpu or triton.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        [in, in]: ``out``, or a new tensor.

    Raises:
        OpError: shapes differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    outs = None if out is None else [out]
    result: torch.Tensor = OP(base, tensor, mirror=mirror, outs=outs, backend=backend, threads=threads)
    return result
