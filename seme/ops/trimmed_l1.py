"""L1 norms of task vectors before and after a trim, per block of 8192 elements, in float64.

What TIES and its relatives need to rescale a trimmed task vector to the norm it had. The sums are formed as in
:mod:`seme.ops.inner_products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.native import BLOCK, View
from seme.ops._op import Op, Params, Spec, check_per_tensor
from seme.ops._task_vectors import check_base, check_integers, deltas, kept, lane_sums

if TYPE_CHECKING:
    import torch


def check(
    specs: Sequence[Spec],
    *,
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType | None = None,
) -> Params:
    """Equal shapes, one threshold and quota per task vector."""
    compute = check_base("trimmed_l1", specs, compute_dtype)
    check_per_tensor("trimmed_l1", "thresholds", thresholds, len(specs) - 1)
    check_per_tensor("trimmed_l1", "tie_quotas", tie_quotas, len(specs) - 1)
    return {
        "thresholds": check_integers("trimmed_l1", "thresholds", thresholds),
        "tie_quotas": check_integers("trimmed_l1", "tie_quotas", tie_quotas),
        "compute_dtype": compute,
    }


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """float64 [blocks, n, 2]."""
    return Spec((-(-specs[0].numel // BLOCK), len(specs) - 1, 2), dtypes.float64)


def reference(
    tensors: Sequence[torch.Tensor], *, thresholds: Sequence[int], tie_quotas: Sequence[int], compute_dtype: DType
) -> torch.Tensor:
    """The sums in plain torch, in the same order."""
    import torch

    rows = []
    for delta, threshold, quota in zip(deltas(tensors, compute_dtype), thresholds, tie_quotas):
        magnitude = delta.double().abs()
        rows += [magnitude, torch.where(kept(delta, threshold, quota), magnitude, 0.0)]
    return lane_sums(torch.stack(rows)).view(-1, len(thresholds), 2)


def run_native(
    tensors: Sequence[View],
    out: View,
    threads: int,
    *,
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
) -> None:
    """The C++ kernel, ``csrc/cpu/trimmed_l1.cpp``."""
    views = [t.raw() for t in tensors]
    compute = compute_dtype.native
    native.module().trimmed_l1(views, thresholds, tie_quotas, compute, out.raw(), threads)


OP = Op(
    name="trimmed_l1",
    arguments="int[] thresholds, int[] tie_quotas, ScalarType? compute_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    ordered=True,
)


def trimmed_l1(
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
    """Sums of magnitudes of each task vector: of all elements and of those that the trim keeps.

    Args:
        base: the base model's tensor.
        tensors: n tensors of its shape.
        thresholds: n magnitude keys; what lies above is kept.
        tie_quotas: n numbers: how many elements equal to the threshold are kept, in element order.
        compute_dtype: default: float64 if an input is float64, else float32.
        out: float64 [blocks, n, 2], written in place.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        float64 [blocks, n, 2]; add the blocks with ``math.fsum``.

    Raises:
        OpError: shapes or counts differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"thresholds": list(thresholds), "tie_quotas": list(tie_quotas), "compute_dtype": compute_dtype}
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)
