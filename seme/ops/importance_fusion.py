"""The base model, and the other one where its change is important: ``b + d`` where ``s >= threshold``, else b.

With ``d`` and the importance ``s`` of :mod:`seme.ops._rows`. ``b + d`` is held in float32 (float64 for float64) and
rounded when it is stored.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.native import View
from seme.ops._op import Op, Params, Spec
from seme.ops._rows import check_factors, check_rows, factors_from, importance
from seme.ops._task_vectors import deltas

if TYPE_CHECKING:
    import torch


def check(
    specs: Sequence[Spec],
    *,
    row: int,
    factors: Sequence[float],
    threshold: float,
    offset: int = 0,
    compute_dtype: DType | None = None,
    out_dtype: DType | None = None,
) -> Params:
    """A base and one other tensor of whole rows, a factor per row."""
    compute = check_rows("importance_fusion", specs, row, compute_dtype)
    return {
        "row": row,
        "factors": check_factors("importance_fusion", specs, row, factors),
        "threshold": dtypes.round_to(compute, threshold),
        "offset": offset,
        "compute_dtype": compute,
        "out_dtype": out_dtype or dtypes.promote([s.dtype for s in specs]),
    }


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """Shape of the inputs in ``out_dtype`` (default: the promoted dtype of the inputs)."""
    return Spec(specs[0].shape, params["out_dtype"])


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    row: int,
    factors: Sequence[float],
    threshold: float,
    offset: int,
    compute_dtype: DType,
) -> torch.Tensor:
    """The formula in plain torch."""
    import torch

    held = dtypes.arithmetic(compute_dtype).to_torch()
    (delta,) = deltas(tensors, compute_dtype)
    keep = importance(tensors, factors, row, offset, compute_dtype) >= threshold
    base = tensors[0].to(compute_dtype.to_torch()).to(held)
    return base + torch.where(keep, delta, torch.zeros_like(delta)).to(held).view(base.shape)


def run_native(
    tensors: Sequence[View],
    out: View,
    threads: int,
    *,
    row: int,
    factors: array[float],
    threshold: float,
    offset: int,
    compute_dtype: DType,
) -> None:
    """The C++ kernel, ``csrc/cpu/importance_fusion.cpp``."""
    views, own = [t.raw() for t in tensors], factors_from(factors, row, offset, out.numel)
    native.module().importance_fusion(views, own, row, threshold, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="importance_fusion",
    arguments="int row, float[] factors, float threshold, int offset=0, ScalarType? compute_dtype=None, "
    "ScalarType? out_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    positional=True,
)


def importance_fusion(
    base: torch.Tensor,
    tensor: torch.Tensor,
    factors: Sequence[float],
    *,
    row: int,
    threshold: float,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Take a tensor where its change from the base is important, the base elsewhere.

    Args:
        base: the base model's tensor.
        tensor: one of its shape.
        factors: one number per row, rounded to ``compute_dtype``.
        row: elements per row; the tensors hold whole rows.
        threshold: an element is taken if ``|tensor - base|`` times the factor of its row is at least this.
        compute_dtype: dtype of inputs and importances; default: float64 if an input is float64, else float32.
        out: written in place.
        out_dtype: dtype of a new output; default: the promoted dtype of the inputs.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``. Never changes a bit of the result.

    Returns:
        The merged tensor, in the shape of the base.

    Raises:
        OpError: shapes or counts differ, the rows are not whole, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"row": row, "factors": list(factors), "threshold": threshold, "compute_dtype": compute_dtype}
    if out is None:
        arguments["out_dtype"] = out_dtype
    return OP([base, tensor], out=out, backend=backend, threads=threads, **arguments)
