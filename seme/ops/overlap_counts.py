"""How many elements each model changes together with others, and how many alone; see :mod:`seme.ops.ram`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.native import View
from seme.ops._op import Op, Params, Spec
from seme.ops._task_vectors import INT64, check_base, deltas
from seme.ops.ram import changes

if TYPE_CHECKING:
    import torch


def check(specs: Sequence[Spec], *, epsilon: float, compute_dtype: DType | None = None) -> Params:
    """Equal shapes."""
    compute = check_base("overlap_counts", specs, compute_dtype)
    return {"epsilon": dtypes.round_to(compute, epsilon), "compute_dtype": compute}


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """int64 [n, 2]."""
    return Spec((len(specs) - 1, 2), INT64)


def reference(tensors: Sequence[torch.Tensor], *, epsilon: float, compute_dtype: DType) -> torch.Tensor:
    """Counts in plain torch."""
    import torch

    masks = torch.stack([changes(d, epsilon) for d in deltas(tensors, compute_dtype)])
    others = masks.sum(0) > 1
    return torch.stack([(masks & others).sum(1), (masks & ~others).sum(1)], dim=1)


def run_native(tensors: Sequence[View], out: View, threads: int, *, epsilon: float, compute_dtype: DType) -> None:
    """The C++ kernel, ``csrc/cpu/ram.cpp``; adds to ``out``."""
    views = [t.raw() for t in tensors]
    native.module().overlap_counts(views, epsilon, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="overlap_counts",
    arguments="float epsilon, ScalarType? compute_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    accumulates=True,
)


def overlap_counts(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    epsilon: float,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Count the elements that each model changes together with others, and alone.

    Args:
        base: the base model's tensor.
        tensors: n >= 1 tensors of its shape.
        epsilon: a task vector of at most this magnitude changes nothing; rounded to ``compute_dtype``.
        compute_dtype: default: float64 if an input is float64, else float32.
        out: int64 [n, 2]; the counts are added to it.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        int64 [n, 2]: of each model the elements that others change as well, and those that it alone changes.

    Raises:
        OpError: shapes differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"epsilon": epsilon, "compute_dtype": compute_dtype}
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)
