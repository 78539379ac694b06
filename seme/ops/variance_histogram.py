"""Histogram of the keys of each element's variance over the task vectors, in a window of 65536 bins.

Bins and columns are those of :mod:`seme.ops.magnitude_histogram`, the variance that of :mod:`seme.ops._variance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import native
from seme.dtypes import DType
from seme.errors import OpError
from seme.native import View
from seme.ops._op import Op, Params, Spec
from seme.ops._task_vectors import INT64, check_base, check_integers, deltas
from seme.ops._variance import variance
from seme.ops.magnitude_histogram import COLUMNS, count_keys

if TYPE_CHECKING:
    import torch


def check(specs: Sequence[Spec], *, lowest: int, shift: int, compute_dtype: DType | None = None) -> Params:
    """Equal shapes, one window."""
    compute = check_base("variance_histogram", specs, compute_dtype)
    check_integers("variance_histogram", "lowest", [lowest])
    if not 0 <= shift <= 47:
        raise OpError(f"variance_histogram: shift is {shift}, expected 0 to 47")
    return {"lowest": int(lowest), "shift": int(shift), "compute_dtype": compute}


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """int64 [1, 65538]."""
    return Spec((1, COLUMNS), INT64)


def reference(tensors: Sequence[torch.Tensor], *, lowest: int, shift: int, compute_dtype: DType) -> torch.Tensor:
    """Counts in plain torch."""
    return count_keys(variance(deltas(tensors, compute_dtype)), lowest, shift)[None]


def run_native(
    tensors: Sequence[View], out: View, threads: int, *, lowest: int, shift: int, compute_dtype: DType
) -> None:
    """The C++ kernel, ``csrc/cpu/variance_histogram.cpp``; adds to ``out``."""
    views = [t.raw() for t in tensors]
    native.module().variance_histogram(views, lowest, shift, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="variance_histogram",
    arguments="int lowest, int shift, ScalarType? compute_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    accumulates=True,
)


def variance_histogram(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    lowest: int,
    shift: int,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Count the keys of each element's variance over the task vectors in a window of bins.

    Args:
        base: the base model's tensor.
        tensors: n >= 1 tensors of its shape.
        lowest: the first key of the window.
        shift: log2 of the keys per bin.
        compute_dtype: default: float64 if an input is float64, else float32.
        out: int64 [1, 65538]; the counts are added to it.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        int64 [1, 65538]: the bins; keys beyond the window; keys inside it that are not the first of their bin.

    Raises:
        OpError: shapes differ, the window is none, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"lowest": lowest, "shift": shift, "compute_dtype": compute_dtype}
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)
