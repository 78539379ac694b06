"""Histogram of the keys of importances in windows of 65536 bins: how quantiles are found without a sort.

Importance and keys are those of :mod:`seme.ops._rows`, bins and columns those of :mod:`seme.ops.magnitude_histogram`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import native
from seme.dtypes import DType
from seme.errors import OpError
from seme.native import View
from seme.ops._op import Op, Params, Spec
from seme.ops._rows import check_factors, check_rows, factors_from, importance, importance_keys
from seme.ops._task_vectors import INT64, check_integers
from seme.ops.magnitude_histogram import COLUMNS, count_in_window

if TYPE_CHECKING:
    import torch


def check(
    specs: Sequence[Spec],
    *,
    row: int,
    factors: Sequence[float],
    lowest: Sequence[int],
    shift: Sequence[int],
    offset: int = 0,
    compute_dtype: DType | None = None,
) -> Params:
    """A base and one other tensor of whole rows, a factor per row, whole windows."""
    compute = check_rows("importance_histogram", specs, row, compute_dtype)
    if len(lowest) != len(shift) or any(s > 47 for s in shift):
        raise OpError(f"importance_histogram: shift is {list(shift)}, expected one of at most 47 per window")
    return {
        "row": row,
        "factors": check_factors("importance_histogram", specs, row, factors),
        "lowest": check_integers("importance_histogram", "lowest", lowest),
        "shift": check_integers("importance_histogram", "shift", shift),
        "offset": offset,
        "compute_dtype": compute,
    }


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """int64 [windows, 65538]."""
    return Spec((len(params["lowest"]), COLUMNS), INT64)


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    row: int,
    factors: Sequence[float],
    lowest: Sequence[int],
    shift: Sequence[int],
    offset: int,
    compute_dtype: DType,
) -> torch.Tensor:
    """Counts in plain torch."""
    import torch

    keys = importance_keys(importance(tensors, factors, row, offset, compute_dtype))
    return torch.stack([count_in_window(keys, low, s) for low, s in zip(lowest, shift)])


def run_native(
    tensors: Sequence[View],
    out: View,
    threads: int,
    *,
    row: int,
    factors: array[float],
    lowest: Sequence[int],
    shift: Sequence[int],
    offset: int,
    compute_dtype: DType,
) -> None:
    """The C++ kernel, ``csrc/cpu/importance_histogram.cpp``; adds to ``out``."""
    views, own = [t.raw() for t in tensors], factors_from(factors, row, offset, tensors[0].numel)
    native.module().importance_histogram(views, own, row, lowest, shift, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="importance_histogram",
    arguments="int row, float[] factors, int[] lowest, int[] shift, int offset=0, ScalarType? compute_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    accumulates=True,
    positional=True,
)


def importance_histogram(
    base: torch.Tensor,
    tensor: torch.Tensor,
    factors: Sequence[float],
    *,
    row: int,
    lowest: Sequence[int],
    shift: Sequence[int],
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Count the keys of importances in windows of bins.

    Args:
        base: the base model's tensor.
        tensor: one of its shape.
        factors: one number per row, rounded to ``compute_dtype``; not negative in float32 and float64.
        row: elements per row; the tensors hold whole rows.
        lowest: the first key of each window.
        shift: log2 of the keys per bin of each window.
        compute_dtype: default: float64 if an input is float64, else float32.
        out: int64 [windows, 65538]; the counts are added to it.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        int64 [windows, 65538]: the bins; keys beyond the window; keys inside it that are not the first of their bin.

    Raises:
        OpError: shapes or counts differ, the rows are not whole, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"row": row, "factors": list(factors), "lowest": list(lowest), "shift": list(shift)}
    return OP([base, tensor], out=out, backend=backend, threads=threads, compute_dtype=compute_dtype, **arguments)
