"""Weighted sum of tensors, or of task vectors and their base, with weights per row or column.

``out = sum_i w_i x_i``, or with ``relative`` ``b + sum_i w_i (x_i - b)``, where the weights are those of the
element's row or column (:mod:`seme.ops._weights`). With R the rounding to ``compute_dtype``: ``R(sum_i w_i x_i)``
with weights of float32 (float64), as in ``weighted_sum``; ``R(b + R(sum_i R(w_i R(x_i - b))))`` with weights of the
compute dtype, as in ``task_vector_sum``. Sums begin at 0 and are held in float32 (float64) in the order of the
inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.errors import OpError
from seme.native import View
from seme.ops import _weights
from seme.ops._op import Op, Params, Spec, check_tensors
from seme.ops._task_vectors import deltas

if TYPE_CHECKING:
    import torch


def check(
    specs: Sequence[Spec],
    *,
    weights: Sequence[float],
    relative: bool = False,
    row: int = 0,
    columns: int = 0,
    offset: int = 0,
    compute_dtype: DType | None = None,
    out_dtype: DType | None = None,
) -> Params:
    """Equal shapes, whole rows, one weight per tensor and row or column."""
    compute = check_tensors("line_sum", specs, compute_dtype)
    if relative and len(specs) < 2:
        raise OpError("line_sum: no tensors besides the base")
    held = compute if relative else dtypes.arithmetic(compute)
    place = {"row": row, "columns": columns, "offset": offset}
    return {
        **_weights.check("line_sum", weights, len(specs) - relative, specs[0].numel, held, **place),
        "relative": relative,
        "compute_dtype": compute,
        "out_dtype": out_dtype or dtypes.promote([s.dtype for s in specs]),
    }


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """Shape of the inputs in ``out_dtype`` (default: the promoted dtype of the inputs)."""
    return Spec(specs[0].shape, params["out_dtype"])


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    weights: Sequence[float],
    relative: bool,
    row: int,
    columns: int,
    offset: int,
    compute_dtype: DType,
) -> torch.Tensor:
    """The formula in plain torch: tensors of the compute dtype round as the formula says."""
    import torch

    compute, held = compute_dtype.to_torch(), dtypes.arithmetic(compute_dtype).to_torch()
    vectors = deltas(tensors, compute_dtype) if relative else [t.to(compute).reshape(-1) for t in tensors]
    total = torch.zeros(vectors[0].shape, dtype=held, device=vectors[0].device)
    for i, vector in enumerate(vectors):
        weight = _weights.per_element(weights, i, len(vectors), vector, row, columns, offset)
        factor = weight if isinstance(weight, float) else weight.to(held)
        term = vector.to(held) * factor
        total = total + (term.to(compute).to(held) if relative else term)
    merged = total.to(compute).view(tensors[0].shape)
    return tensors[0].to(compute) + merged if relative else merged


def run_native(
    tensors: Sequence[View],
    out: View,
    threads: int,
    *,
    weights: Sequence[float],
    relative: bool,
    row: int,
    columns: int,
    offset: int,
    compute_dtype: DType,
) -> None:
    """The C++ kernel, ``csrc/cpu/line_sum.cpp``."""
    views = [t.raw() for t in tensors]
    mine = _weights.here(weights, len(tensors) - relative, out.numel, row, offset)
    place, code = (row, columns, offset), compute_dtype.native
    native.module().line_sum(views, relative, mine, place, code, out.raw(), threads)


OP = Op(
    name="line_sum",
    arguments=f"float[] weights, bool relative=False, {_weights.ARGUMENTS}, ScalarType? compute_dtype=None, "
    "ScalarType? out_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    positional=True,
)


def line_sum(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    relative: bool = False,
    row: int = 0,
    columns: int = 0,
    offset: int = 0,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """``sum_i w_i * tensors[i]``, or ``tensors[0] + sum_i w_i * (tensors[i + 1] - tensors[0])``, per row or column.

    Args:
        tensors: tensors of one shape; bfloat16, float16, float32, float64, mixed as you like.
        weights: with ``row`` n for each row, row after row; with ``columns`` one for each column, tensor after tensor;
            else n numbers.
        relative: the first tensor is a base, so n is one less than tensors are given.
        row: elements of a row, where each row has weights of its own.
        columns: elements of a row, where each column has weights of its own.
        offset: number of the first element, where a part of a tensor is given and the weights are those of all of it.
        compute_dtype: dtype of inputs and intermediate results; default: float64 if an input is float64, else
            float32.
        out: written in place.
        out_dtype: dtype of a new output; default: the promoted dtype of the inputs.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``. Never changes a bit of the result.

    Returns:
        The sum, in the shape of the inputs.

    Raises:
        OpError: shapes or counts differ, rows are not whole, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    place = {"row": row, "columns": columns, "offset": offset}
    arguments = {"weights": list(weights), "relative": relative, **place, "compute_dtype": compute_dtype}
    if out is None:
        arguments["out_dtype"] = out_dtype
    return OP(tensors, out=out, backend=backend, threads=threads, **arguments)
