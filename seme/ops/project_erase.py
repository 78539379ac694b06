"""``base + scale * sum_m T_m P_m``, ``T_m = tensors[m] - base``: ``erase`` of rule ``project`` with given shares.

``P_m`` is the share of each input direction that belongs to expert m; what ``T_m`` does elsewhere is erased.

Flops: ``2 n r in^2``. Least bytes: base and tensors once, ``2 (n + 1) r in`` in bfloat16, the matrices once, ``out``
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme.dtypes import DType
from seme.errors import OpError
from seme.ops._matrix import (
    MatrixOp,
    Plan,
    acc_of,
    add_scaled,
    check_experts,
    check_matrix,
    like,
    task_vectors,
    tile_rows,
    tiles,
    workspace,
)
from seme.ops._op import Spec

if TYPE_CHECKING:
    import torch


def check(
    base: Spec,
    tensors: Sequence[Spec],
    projections: Sequence[Spec],
    *,
    scale: float = 1.0,
    out_dtype: DType | None = None,
) -> Plan:
    """Matrices of one shape, and one square matrix for each tensor."""
    check_experts("project_erase", base, tensors)
    width = base.shape[1]
    if len(projections) != len(tensors):
        raise OpError(f"project_erase: projections has {len(projections)} entries for {len(tensors)} tensors")
    for i, spec in enumerate(projections):
        check_matrix("project_erase", f"projections[{i}]", spec, (width, width), "for the columns of base")
    result = Spec(base.shape, out_dtype or base.dtype)
    check_matrix("project_erase", "out", result, base.shape)
    return {"scale": float(scale)}, (result,)


def reference(
    base: torch.Tensor, tensors: list[torch.Tensor], projections: list[torch.Tensor], *, scale: float
) -> torch.Tensor:
    """The formula; rounded when it is stored."""
    acc = acc_of(base, tensors, projections)
    origin = base.to(acc)
    parts = [(t.to(acc) - origin) @ p.to(acc) for t, p in zip(tensors, projections)]
    return origin + scale * sum(parts[1:], parts[0])


def run_cpu(
    base: torch.Tensor,
    tensors: list[torch.Tensor],
    projections: list[torch.Tensor],
    out: torch.Tensor,
    *,
    threads: int,
    scale: float,
) -> None:
    """Row tiles: T_m in C++, products by torch, the sum with the base and its rounding in C++."""
    rows, width = base.shape
    acc, step = acc_of(base, tensors, projections), tile_rows(width)
    memory, sums = (workspace(min(rows, step), width, acc) for _ in range(2))
    factors = [p.to(acc) for p in projections]
    for part in tiles(rows, step):
        total = like(out[part], sums)
        for m, (tensor, factor) in enumerate(zip(tensors, factors)):
            delta = task_vectors(base[part], [tensor[part]], memory, threads)
            total.addmm_(delta, factor, beta=0 if m == 0 else 1)
        add_scaled(base[part], total, scale, out[part], threads)


OP = MatrixOp(
    name="project_erase",
    operands="Tensor base, Tensor[] tensors, Tensor[] projections",
    results=("out",),
    arguments="float scale=1.0, ScalarType? out_dtype=None",
    check=check,
    reference=reference,
    cpu=run_cpu,
)


def project_erase(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    projections: Sequence[torch.Tensor],
    *,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Add the projected task vectors to the base: ``base + scale * sum_m (tensors[m] - base) @ projections[m]``.

    Args:
        base: the base model's matrix [r, in] (or some rows of it), of any strides.
        tensors: n matrices of the same shape; bfloat16, float16, float32, float64, mixed as you like.
        projections: n matrices [in, in].
        scale: factor of the sum (lambda).
        out_dtype: dtype of a new output; default: that of the base.
        out: [r, in], overwritten, rounded to its dtype once; it must not share memory with an operand.
        backend: auto, torch, cpu or triton.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        [r, in]: ``out``, or a new tensor.

    Raises:
        OpError: shapes or counts differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {} if out is not None else {"out_dtype": out_dtype}
    outs = None if out is None else [out]
    operands = (base, list(tensors), list(projections))
    result: torch.Tensor = OP(*operands, scale=scale, outs=outs, backend=backend, threads=threads, **arguments)
    return result
