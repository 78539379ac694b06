"""Weighted sum of n tensors: ``out = sum_i w_i x_i / divisor``.

The formula of model soups (Wortsman et al. 2022, arXiv 2203.05482) and, with two tensors and their sine
coefficients, the output pass of slerp. Inputs are rounded to ``compute_dtype`` on load; products and sums are
held in float32 (float64 if ``compute_dtype`` is float64), in the order of the inputs; the result is rounded to
``compute_dtype`` once and then stored in the dtype of ``out``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.native import View
from seme.ops._op import Op, Params, Spec, check_per_tensor, check_tensors

if TYPE_CHECKING:
    import torch


def check(
    specs: Sequence[Spec],
    *,
    weights: Sequence[float],
    divisor: float = 1.0,
    compute_dtype: DType | None = None,
    out_dtype: DType | None = None,
) -> Params:
    """Equal shapes, one weight per tensor; weights and divisor rounded to the type of the sums."""
    compute = check_tensors("weighted_sum", specs, compute_dtype)
    check_per_tensor("weighted_sum", "weights", weights, len(specs))
    held = dtypes.arithmetic(compute)
    return {
        "weights": [dtypes.round_to(held, w) for w in weights],
        "divisor": dtypes.round_to(held, divisor),
        "compute_dtype": compute,
        "out_dtype": out_dtype or dtypes.promote([s.dtype for s in specs]),
    }


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """Shape of the inputs in ``out_dtype`` (default: the promoted dtype of the inputs)."""
    return Spec(specs[0].shape, params["out_dtype"])


def reference(
    tensors: Sequence[torch.Tensor], *, weights: Sequence[float], divisor: float, compute_dtype: DType
) -> torch.Tensor:
    """The formula in plain torch."""
    compute, held = compute_dtype.to_torch(), dtypes.arithmetic(compute_dtype).to_torch()
    total = tensors[0].to(compute).to(held) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:]):
        total = total + tensor.to(compute).to(held) * weight
    return (total / divisor).to(compute)


def run_native(
    tensors: Sequence[View],
    out: View,
    threads: int,
    *,
    weights: Sequence[float],
    divisor: float,
    compute_dtype: DType,
) -> None:
    """The C++ kernel, ``csrc/cpu/weighted_sum.cpp``."""
    views = [t.raw() for t in tensors]
    native.module().weighted_sum(views, weights, divisor, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="weighted_sum",
    arguments="float[] weights, float divisor=1.0, ScalarType? compute_dtype=None, ScalarType? out_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
)


def weighted_sum(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    divisor: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """``sum_i weights[i] * tensors[i] / divisor``.

    Args:
        tensors: n >= 1 tensors of one shape; bfloat16, float16, float32, float64, mixed as you like.
        weights: n numbers.
        divisor: the sum is divided by it; 0 gives inf or NaN, as in mergekit.
        compute_dtype: dtype the inputs are rounded to on load and the result before the store. Default:
            float64 if an input is float64, else float32.
        out: written in place; it may be one of the inputs, but must not overlap one in part.
        out_dtype: dtype of a new output; default: the promoted dtype of the inputs.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``. Never changes a bit of the result.

    Returns:
        The merged tensor, in the shape of the inputs.

    Raises:
        OpError: shapes or counts differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"weights": list(weights), "divisor": divisor, "compute_dtype": compute_dtype}
    if out is None:
        arguments["out_dtype"] = out_dtype
    return OP(tensors, out=out, backend=backend, threads=threads, **arguments)
