"""Of every element the more from another tensor, the nearer that is to the base: ``out = s x + (1 - s) b``.

``s = t / max(|b - x|, 1e-6)``, between 0 and 1. NearSwap (alchemonaut 2024, QuartetAnemoi) as mergekit computes it:
with R the rounding to ``compute_dtype``, ``s = R(R(1 / max(|R(b - x)|, R(1e-6))) t)``, cut off at 0 and 1, and
``R(R(s x) + R(R(1 - s) b))``. t is a value of float32 (float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.errors import OpError
from seme.native import View
from seme.ops._op import Op, Params, Spec
from seme.ops._task_vectors import check_base

if TYPE_CHECKING:
    import torch

LEAST = 1e-6


def check(
    specs: Sequence[Spec],
    *,
    t: float,
    compute_dtype: DType | None = None,
    out_dtype: DType | None = None,
) -> Params:
    """Two equal shapes."""
    compute = check_base("nearswap", specs, compute_dtype)
    if len(specs) != 2:
        raise OpError(f"nearswap: one tensor besides the base expected, found {len(specs) - 1}")
    return {
        "t": dtypes.round_to(dtypes.arithmetic(compute), t),
        "least": dtypes.round_to(compute, LEAST),
        "compute_dtype": compute,
        "out_dtype": out_dtype or dtypes.promote([s.dtype for s in specs]),
    }


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """Shape of the inputs in ``out_dtype`` (default: the promoted dtype of the inputs)."""
    return Spec(specs[0].shape, params["out_dtype"])


def reference(tensors: Sequence[torch.Tensor], *, t: float, least: float, compute_dtype: DType) -> torch.Tensor:
    """The formula in plain torch: tensors of the compute dtype round as the formula says."""
    compute = compute_dtype.to_torch()
    base, other = (x.to(compute) for x in tensors)
    share = ((base - other).abs().clamp(min=least).reciprocal() * t).clamp(0, 1)
    merged: torch.Tensor = share * other + (1 - share) * base
    return merged


def run_native(
    tensors: Sequence[View], out: View, threads: int, *, t: float, least: float, compute_dtype: DType
) -> None:
    """The C++ kernel, ``csrc/cpu/nearswap.cpp``."""
    views = [v.raw() for v in tensors]
    native.module().nearswap(views, t, least, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="nearswap",
    arguments="float t, ScalarType? compute_dtype=None, ScalarType? out_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
)


def nearswap(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    t: float,
    *,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """``s * tensors[0] + (1 - s) * base`` with ``s = t / max(|base - tensors[0]|, 1e-6)``, at least 0 and at most 1.

    Args:
        base: the base model's tensor.
        tensors: one tensor of its shape; bfloat16, float16, float32, float64.
        t: elements that are nearer than this are taken from the other tensor.
        compute_dtype: dtype of inputs and intermediate results; default: float64 if an input is float64, else
            float32.
        out: written in place.
        out_dtype: dtype of a new output; default: the promoted dtype of the inputs.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``. Never changes a bit of the result.

    Returns:
        The merged tensor, in the shape of the base.

    Raises:
        OpError: shapes or counts differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"t": t, "compute_dtype": compute_dtype}
    if out is None:
        arguments["out_dtype"] = out_dtype
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)
