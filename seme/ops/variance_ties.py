"""How many elements have a variance over the task vectors with exactly a given key; see :mod:`seme.ops._variance`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import native
from seme.dtypes import DType
from seme.native import View
from seme.ops._op import Op, Params, Spec
from seme.ops._task_vectors import INT64, UNLIMITED, check_base, deltas, magnitude_keys
from seme.ops._variance import check_selection, variance

if TYPE_CHECKING:
    import torch


def check(specs: Sequence[Spec], *, thresholds: Sequence[int], compute_dtype: DType | None = None) -> Params:
    """Equal shapes, one threshold."""
    compute = check_base("variance_ties", specs, compute_dtype)
    found, _ = check_selection("variance_ties", thresholds, [UNLIMITED])
    return {"thresholds": found, "compute_dtype": compute}


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """int64 [1]."""
    return Spec((1,), INT64)


def reference(tensors: Sequence[torch.Tensor], *, thresholds: Sequence[int], compute_dtype: DType) -> torch.Tensor:
    """The count in plain torch."""
    found: torch.Tensor = (magnitude_keys(variance(deltas(tensors, compute_dtype))) == thresholds[0]).sum()
    return found.reshape(1)


def run_native(
    tensors: Sequence[View], out: View, threads: int, *, thresholds: Sequence[int], compute_dtype: DType
) -> None:
    """The C++ kernel, ``csrc/cpu/variance_ties.cpp``; adds to ``out``."""
    views = [t.raw() for t in tensors]
    native.module().variance_ties(views, thresholds[0], compute_dtype.native, out.raw(), threads)


OP = Op(
    name="variance_ties",
    arguments="int[] thresholds, ScalarType? compute_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    accumulates=True,
)


def variance_ties(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    thresholds: Sequence[int],
    *,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Count the elements whose variance over the task vectors has a given key.

    Args:
        base: the base model's tensor.
        tensors: n >= 1 tensors of its shape.
        thresholds: one key: bits of the variance in ``compute_dtype``, without the sign.
        compute_dtype: default: float64 if an input is float64, else float32.
        out: int64 [1]; the count is added to it.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        int64 [1].

    Raises:
        OpError: shapes or counts differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"thresholds": list(thresholds), "compute_dtype": compute_dtype}
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)
