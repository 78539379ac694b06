"""How many elements of each task vector have exactly a given magnitude key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import native
from seme.dtypes import DType
from seme.native import View
from seme.ops._op import Op, Params, Spec, check_per_tensor
from seme.ops._task_vectors import INT64, check_base, check_integers, deltas, magnitude_keys

if TYPE_CHECKING:
    import torch


def check(specs: Sequence[Spec], *, thresholds: Sequence[int], compute_dtype: DType | None = None) -> Params:
    """Equal shapes, one or two thresholds per task vector."""
    compute, count = check_base("tie_counts", specs, compute_dtype), len(specs) - 1
    if len(thresholds) != 2 * count:
        check_per_tensor("tie_counts", "thresholds", thresholds, count)
    return {"thresholds": check_integers("tie_counts", "thresholds", thresholds), "compute_dtype": compute}


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """int64, as many as thresholds."""
    return Spec((len(params["thresholds"]),), INT64)


def reference(tensors: Sequence[torch.Tensor], *, thresholds: Sequence[int], compute_dtype: DType) -> torch.Tensor:
    """Counts in plain torch."""
    import torch

    keys = [magnitude_keys(d) for d in deltas(tensors, compute_dtype)]
    return torch.stack([(keys[i % len(keys)] == threshold).sum() for i, threshold in enumerate(thresholds)])


def run_native(
    tensors: Sequence[View], out: View, threads: int, *, thresholds: Sequence[int], compute_dtype: DType
) -> None:
    """The C++ kernel, ``csrc/cpu/tie_counts.cpp``; adds to ``out``."""
    views = [t.raw() for t in tensors]
    native.module().tie_counts(views, thresholds, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="tie_counts",
    arguments="int[] thresholds, ScalarType? compute_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    accumulates=True,
)


def tie_counts(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    thresholds: Sequence[int],
    *,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Count the elements of each task vector whose magnitude key equals a threshold.

    Args:
        base: the base model's tensor.
        tensors: n tensors of its shape.
        thresholds: n or 2 n keys, bits of the magnitude in ``compute_dtype`` without the sign; the second n are of
            the same task vectors.
        compute_dtype: default: float64 if an input is float64, else float32.
        out: int64, as many as thresholds; the counts are added to it.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        int64, as many as thresholds.

    Raises:
        OpError: shapes or counts differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"thresholds": list(thresholds), "compute_dtype": compute_dtype}
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)
