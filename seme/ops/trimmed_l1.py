"""L1 norms of task vectors, of all of it and of what is kept, per block of 8192 elements or per row, in float64.

What TIES and its relatives need to rescale what they keep to the norm of the whole. The sums are formed as in
:mod:`seme.ops.inner_products`; a selection with ranks within rows has sums of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from seme import dtypes, native
from seme.dtypes import DType
from seme.native import BLOCK, View
from seme.ops._op import Op, Params, Spec
from seme.ops._task_vectors import (
    SELECTION,
    check_base,
    check_selection,
    deltas,
    kept,
    lane_sums,
    native_ranks,
    native_selection,
)

if TYPE_CHECKING:
    import torch


def check(specs: Sequence[Spec], *, compute_dtype: DType | None = None, **selection: Any) -> Params:
    """Equal shapes, a selection per task vector."""
    compute = check_base("trimmed_l1", specs, compute_dtype)
    return {**check_selection("trimmed_l1", specs, **selection), "compute_dtype": compute}


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """float64 [blocks or rows, n, 2]."""
    return Spec((-(-specs[0].numel // (params["row"] or BLOCK)), len(specs) - 1, 2), dtypes.float64)


def reference(tensors: Sequence[torch.Tensor], *, compute_dtype: DType, **selection: Any) -> torch.Tensor:
    """The sums in plain torch, in the same order."""
    import torch

    pairs = zip(deltas(tensors, compute_dtype), kept(tensors, compute_dtype, **selection))
    rows = [delta.double().abs() for pair in pairs for delta in pair]
    return lane_sums(torch.stack(rows), selection["row"] or BLOCK).view(-1, len(rows) // 2, 2)


def run_native(tensors: Sequence[View], out: View, threads: int, *, compute_dtype: DType, **selection: Any) -> None:
    """The C++ kernel, ``csrc/cpu/trimmed_l1.cpp``."""
    views = [t.raw() for t in tensors]
    chosen = (*native_selection(selection), *native_ranks(selection))
    native.module().trimmed_l1(views, chosen, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="trimmed_l1",
    arguments=f"{SELECTION}, ScalarType? compute_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    positional=True,
    ordered=True,
)


def trimmed_l1(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
    **selection: Any,
) -> torch.Tensor:
    """Sums of magnitudes of each task vector: of all elements and of those that are kept.

    Args:
        base: the base model's tensor.
        tensors: n tensors of its shape.
        compute_dtype: default: float64 if an input is float64, else float32.
        out: float64 [blocks or rows, n, 2], written in place.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.
        selection: what is kept, as :func:`seme.ops._task_vectors.check_selection` takes it; default: all.

    Returns:
        float64 [blocks, n, 2], with ``row`` [rows, n, 2]; add them up with ``math.fsum``.

    Raises:
        OpError: shapes or counts differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    return OP([base, *tensors], out=out, backend=backend, threads=threads, compute_dtype=compute_dtype, **selection)
