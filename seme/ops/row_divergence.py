"""The Kullback-Leibler divergence of the softmax of each row from that of the base model's row.

With ``p = softmax(x)`` and ``q = softmax(b)`` over a row: ``sum (p + 1e-8) log((p + 1e-8) / (q + 1e-8))``, in float64;
not below 0. With ``rounded=True``, for bfloat16 and float16, p, both sums with 1e-8, their quotient, its logarithm and
the products are rounded to ``compute_dtype``, and so is the sum, which may then be negative.

exp and log are those of each backend: results are equal to a relative error of 1e-12 of ``sum p |log(p / q)|``, not to
the bit; where roundings follow, one of them may fall to either side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.native import View
from seme.ops._op import Op, Params, Spec
from seme.ops._rows import check_rows

if TYPE_CHECKING:
    import torch

EPSILON = 1e-8


def check(specs: Sequence[Spec], *, row: int, rounded: bool = False, compute_dtype: DType | None = None) -> Params:
    """A base and one other tensor of whole rows."""
    return {"row": row, "rounded": rounded, "compute_dtype": check_rows("row_divergence", specs, row, compute_dtype)}


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """float64 [rows]."""
    return Spec((specs[0].numel // params["row"],), dtypes.float64)


def reference(tensors: Sequence[torch.Tensor], *, row: int, rounded: bool, compute_dtype: DType) -> torch.Tensor:
    """The formula in plain torch."""
    import torch

    compute = compute_dtype.to_torch()

    def shorten(x: torch.Tensor) -> torch.Tensor:
        return x.to(compute).double() if rounded else x

    q, p = (shorten(torch.softmax(t.to(compute).double().reshape(-1, row), dim=-1)) for t in tensors)
    p, q = shorten(p + EPSILON), shorten(q + EPSILON)
    found = shorten(shorten(p * shorten(torch.log(shorten(p / q)))).sum(1))
    return found if rounded else torch.where(found < 0, 0.0, found)


def run_native(
    tensors: Sequence[View], out: View, threads: int, *, row: int, rounded: bool, compute_dtype: DType
) -> None:
    """The C++ kernel, ``csrc/cpu/row_divergence.cpp``."""
    views = [t.raw() for t in tensors]
    native.module().row_divergence(views, row, rounded, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="row_divergence",
    arguments="int row, bool rounded=False, ScalarType? compute_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    ordered=True,
)


def row_divergence(
    base: torch.Tensor,
    tensor: torch.Tensor,
    *,
    row: int,
    rounded: bool = False,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Divergence of the softmax of each row from that of the base's row.

    Args:
        base: the base model's tensor.
        tensor: one of its shape.
        row: elements per row; the tensors hold whole rows.
        rounded: round every intermediate result to ``compute_dtype``.
        compute_dtype: dtype the inputs are rounded to; default: float64 if an input is float64, else float32.
        out: float64 [rows], written in place.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        float64 [rows].

    Raises:
        OpError: shapes differ, the rows are not whole, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"row": row, "rounded": rounded, "compute_dtype": compute_dtype}
    return OP([base, tensor], out=out, backend=backend, threads=threads, **arguments)
