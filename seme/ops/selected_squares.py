"""Squared norms of task vectors at the positions that are selected by their variance, per block of 8192 elements.

With R the rounding to ``compute_dtype`` and ``d_i = R(x_i - b)``: the sum of ``R(d_i^2)`` over the positions whose
variance has a key above the threshold, or is one of the first ties with it (:mod:`seme.ops._variance`), in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.native import BLOCK, View
from seme.ops._op import Op, Params, Spec
from seme.ops._task_vectors import check_base, lane_sums
from seme.ops._variance import check_selection, selected

if TYPE_CHECKING:
    import torch


def check(
    specs: Sequence[Spec],
    *,
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType | None = None,
) -> Params:
    """Equal shapes, one threshold and quota."""
    compute = check_base("selected_squares", specs, compute_dtype)
    found, quotas = check_selection("selected_squares", thresholds, tie_quotas)
    return {"thresholds": found, "tie_quotas": quotas, "compute_dtype": compute}


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """float64 [blocks, n]."""
    return Spec((-(-specs[0].numel // BLOCK), len(specs) - 1), dtypes.float64)


def reference(
    tensors: Sequence[torch.Tensor], *, thresholds: Sequence[int], tie_quotas: Sequence[int], compute_dtype: DType
) -> torch.Tensor:
    """The sums in plain torch, in the same order."""
    import torch

    rows = [(d * d).double() for d in selected(tensors, thresholds, tie_quotas, compute_dtype)]
    return lane_sums(torch.stack(rows))


def run_native(
    tensors: Sequence[View],
    out: View,
    threads: int,
    *,
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
) -> None:
    """The C++ kernel, ``csrc/cpu/selected_squares.cpp``."""
    views, selection = [t.raw() for t in tensors], (thresholds[0], tie_quotas[0])
    native.module().selected_squares(views, *selection, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="selected_squares",
    arguments="int[] thresholds, int[] tie_quotas, ScalarType? compute_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    ordered=True,
)


def selected_squares(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    *,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Squared norms of task vectors where they are selected, per block of 8192 elements.

    Args:
        base: the base model's tensor.
        tensors: n >= 1 tensors of its shape.
        thresholds: one variance key for all of them; positions above are selected. 0, with a quota of 2^62, selects
            all.
        tie_quotas: one number: of the positions equal to the threshold, how many are selected, in element order.
        compute_dtype: default: float64 if an input is float64, else float32.
        out: float64 [blocks, n], written in place.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        float64 [blocks, n].

    Raises:
        OpError: shapes or counts differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"thresholds": list(thresholds), "tie_quotas": list(tie_quotas), "compute_dtype": compute_dtype}
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)
