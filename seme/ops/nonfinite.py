"""Counts inf and NaN elements, and replaces them by zero on request.

The engine looks at every input before it merges it, so this reads the exponent bits in the stored dtype and
converts nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.native import View
from seme.ops._op import Op, Params, Spec, check_tensors

if TYPE_CHECKING:
    import torch


def check(specs: Sequence[Spec], *, compute_dtype: DType | None = None) -> Params:
    """Floating-point tensors of one shape."""
    check_tensors("nonfinite", specs, compute_dtype)
    return {}


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """One count per tensor."""
    return Spec((len(specs),), dtypes.BY_NAME["int64"])


def reference(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Counts in plain torch."""
    import torch

    return torch.stack([(~torch.isfinite(t)).sum() for t in tensors])


def run_native(tensors: Sequence[View], out: View, threads: int) -> None:
    """The C++ kernel, ``csrc/cpu/nonfinite.cpp``."""
    native.module().nonfinite([t.raw() for t in tensors], out.raw(), threads, False)


OP = Op(
    name="nonfinite",
    arguments="",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    accumulates=True,
)


def nonfinite(
    tensors: Sequence[torch.Tensor], *, out: torch.Tensor | None = None, backend: str = "auto", threads: int = 0
) -> torch.Tensor:
    """Count the inf and NaN elements of each tensor.

    Args:
        tensors: n tensors of one shape.
        out: int64 [n]; the counts are added to it.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        int64 [n].

    Raises:
        OpError: shapes differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    return OP(tensors, out=out, backend=backend, threads=threads)


def zero_nonfinite_(views: Sequence[View]) -> None:
    """Replace inf and NaN by 0 in CPU memory, in place."""
    if native.why_not("_C") is None:
        counts = array("q", bytes(8 * len(views)))
        out = View(counts.buffer_info()[0], len(counts), dtypes.BY_NAME["int64"])
        native.module().nonfinite([v.raw() for v in views], out.raw(), 1, True)
        return
    import ctypes

    import torch

    for view in views:
        raw = (ctypes.c_char * (view.numel * view.dtype.itemsize)).from_address(view.address)
        tensor = torch.frombuffer(raw, dtype=view.dtype.to_torch())
        tensor[~torch.isfinite(tensor)] = 0
