"""A base plus weighted task vectors: ``out = b + scale * sum_i w_i (x_i - b) / divisor``.

The formula of task arithmetic (Ilharco et al. 2023, arXiv 2212.04089), also for what is kept of the task vectors,
scaled by ``factors[i]``. With R the rounding to ``compute_dtype`` and ``t_i`` the kept part of ``R(x_i - b)``:
``b + R(R(R(sum_i R(w_i t_i)) / divisor) * scale)``, rounded by R; the sum is held in float32 (float64 for
float64) in the order of the inputs. The weights and the divisor are values of the compute dtype, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from seme import dtypes, native
from seme.dtypes import DType
from seme.native import View
from seme.ops._op import Op, Params, Spec, check_per_tensor
from seme.ops._task_vectors import (
    SELECTION,
    check_base,
    check_selection,
    kept,
    native_ranks,
    native_selection,
    weighted,
)

if TYPE_CHECKING:
    import torch


def check(
    specs: Sequence[Spec],
    *,
    weights: Sequence[float],
    factors: Sequence[float] = (),
    divisor: float = 1.0,
    scale: float = 1.0,
    compute_dtype: DType | None = None,
    out_dtype: DType | None = None,
    **selection: Any,
) -> Params:
    """Equal shapes; weight, factor and selection per task vector."""
    compute, count = check_base("task_vector_sum", specs, compute_dtype, least=0), len(specs) - 1
    held = dtypes.arithmetic(compute)
    factors = factors or [1.0] * count
    check_per_tensor("task_vector_sum", "weights", weights, count)
    check_per_tensor("task_vector_sum", "factors", factors, count)
    return {
        "weights": [dtypes.round_to(compute, w) for w in weights],
        "factors": [dtypes.round_to(held, f) for f in factors],
        **check_selection("task_vector_sum", specs, **selection),
        "divisor": dtypes.round_to(compute, divisor),
        "scale": dtypes.round_to(held, scale),
        "compute_dtype": compute,
        "out_dtype": out_dtype or dtypes.promote([s.dtype for s in specs]),
    }


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """Shape of the inputs in ``out_dtype`` (default: the promoted dtype of the inputs)."""
    return Spec(specs[0].shape, params["out_dtype"])


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    weights: Sequence[float],
    factors: Sequence[float],
    divisor: float,
    scale: float,
    compute_dtype: DType,
    **selection: Any,
) -> torch.Tensor:
    """The formula in plain torch: tensors of the compute dtype round as the formula says."""
    compute, held = compute_dtype.to_torch(), dtypes.arithmetic(compute_dtype).to_torch()
    base = tensors[0].to(compute)
    if len(tensors) == 1:
        return base
    total, *others = weighted(kept(tensors, compute_dtype, **selection), weights, factors, compute_dtype)
    for term in others:
        total = total + term
    merged = total.to(compute)
    if divisor != 1.0:
        merged = (merged.to(held) / divisor).to(compute)
    if scale != 1.0:
        merged = (merged.to(held) * scale).to(compute)
    return base + merged.view(base.shape)


def run_native(
    tensors: Sequence[View],
    out: View,
    threads: int,
    *,
    weights: Sequence[float],
    factors: Sequence[float],
    divisor: float,
    scale: float,
    compute_dtype: DType,
    **selection: Any,
) -> None:
    """The C++ kernel, ``csrc/cpu/task_vector_sum.cpp``."""
    views = [t.raw() for t in tensors]
    chosen = (*native_selection(selection), *native_ranks(selection))
    native.module().task_vector_sum(
        views, weights, factors, chosen, divisor, scale, compute_dtype.native, out.raw(), threads
    )


OP = Op(
    name="task_vector_sum",
    arguments=f"float[] weights, float[] factors=[], {SELECTION}, float divisor=1.0, float scale=1.0, "
    "ScalarType? compute_dtype=None, ScalarType? out_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    positional=True,
)


def task_vector_sum(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    factors: Sequence[float] = (),
    divisor: float = 1.0,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    threads: int = 0,
    **selection: Any,
) -> torch.Tensor:
    """``base + scale * sum_i weights[i] * (tensors[i] - base) / divisor``, of all elements or of selected ones.

    Args:
        base: the base model's tensor.
        tensors: n >= 0 tensors of its shape; bfloat16, float16, float32, float64, mixed as you like.
        weights: n numbers, rounded to ``compute_dtype``.
        factors: n numbers that what is kept of the task vectors is multiplied by; default: 1.
        divisor: the sum of task vectors is divided by it.
        scale: and multiplied by it (lambda).
        compute_dtype: dtype of inputs and intermediate results; default: float64 if an input is float64, else
            float32.
        out: written in place.
        out_dtype: dtype of a new output; default: the promoted dtype of the inputs.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``. Never changes a bit of the result.
        selection: what is kept, as :func:`seme.ops._task_vectors.check_selection` takes it; default: all.

    Returns:
        The merged tensor, in the shape of the base.

    Raises:
        OpError: shapes or counts differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {
        "weights": list(weights),
        "factors": list(factors),
        "divisor": divisor,
        "scale": scale,
        "compute_dtype": compute_dtype,
        **selection,
    }
    if out is None:
        arguments["out_dtype"] = out_dtype
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)
