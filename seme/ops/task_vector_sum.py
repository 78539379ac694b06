"""A base plus weighted task vectors: ``out = b + scale * sum_i w_i (x_i - b) / divisor``.

The formula of task arithmetic (Ilharco et al. 2023, arXiv 2212.04089). With R the rounding to ``compute_dtype``:
``b + R(R(R(sum_i R(w_i R(x_i - b))) / divisor) * scale)``, rounded by R; the sum is held in float32 (float64 for
float64) in the order of the inputs. The weights and the divisor are values of the compute dtype, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.native import View
from seme.ops._op import Op, Params, Spec, check_per_tensor
from seme.ops._task_vectors import check_base, deltas

if TYPE_CHECKING:
    import torch


def check(
    specs: Sequence[Spec],
    *,
    weights: Sequence[float],
    divisor: float = 1.0,
    scale: float = 1.0,
    compute_dtype: DType | None = None,
    out_dtype: DType | None = None,
) -> Params:
    """Equal shapes, one weight per task vector."""
    compute = check_base("task_vector_sum", specs, compute_dtype, least=0)
    check_per_tensor("task_vector_sum", "weights", weights, len(specs) - 1)
    return {
        "weights": [dtypes.round_to(compute, w) for w in weights],
        "divisor": dtypes.round_to(compute, divisor),
        "scale": dtypes.round_to(dtypes.arithmetic(compute), scale),
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
    divisor: float,
    scale: float,
    compute_dtype: DType,
) -> torch.Tensor:
    """The formula in plain torch: tensors of the compute dtype round as the formula says."""
    compute, held = compute_dtype.to_torch(), dtypes.arithmetic(compute_dtype).to_torch()
    base = tensors[0].to(compute)
    if len(tensors) == 1:
        return base
    total = None
    for delta, weight in zip(deltas(tensors, compute_dtype), weights):
        term = (delta * weight).to(held)
        total = term if total is None else total + term
    assert total is not None
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
    divisor: float,
    scale: float,
    compute_dtype: DType,
) -> None:
    """The C++ kernel, ``csrc/cpu/task_vector_sum.cpp``."""
    views = [t.raw() for t in tensors]
    native.module().task_vector_sum(views, weights, divisor, scale, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="task_vector_sum",
    arguments="float[] weights, float divisor=1.0, float scale=1.0, ScalarType? compute_dtype=None, "
    "ScalarType? out_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
)


def task_vector_sum(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    divisor: float = 1.0,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """``base + scale * sum_i weights[i] * (tensors[i] - base) / divisor``.

    Args:
        base: the base model's tensor.
        tensors: n >= 0 tensors of its shape; bfloat16, float16, float32, float64, mixed as you like.
        weights: n numbers, rounded to ``compute_dtype``.
        divisor: the sum of task vectors is divided by it.
        scale: and multiplied by it (lambda).
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
    arguments = {"weights": list(weights), "divisor": divisor, "scale": scale, "compute_dtype": compute_dtype}
    if out is None:
        arguments["out_dtype"] = out_dtype
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)
