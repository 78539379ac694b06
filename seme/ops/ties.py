"""TIES on what is kept of task vectors: weight, elect a sign per element, average what agrees, add to the base.

Yadav et al. 2023, arXiv 2306.01708, with mergekit's order of operations. With R the rounding to ``compute_dtype``
and ``t_i`` the kept part of ``R(x_i - b)``, scaled by ``factors[i]``: ``p_i = R(w_i t_i)``; the elected sign is plus
where ``R(sum_i p_i) >= 0``, else minus; the merged task vector is the sum of the ``p_i`` that agree over the sum of
their weights (1 where that is 0), each sum held in float32 (float64 for float64) and rounded by R once.
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
    normalize: bool = True,
    scale: float = 1.0,
    compute_dtype: DType | None = None,
    out_dtype: DType | None = None,
    **selection: Any,
) -> Params:
    """Equal shapes; weight, factor and selection per task vector."""
    compute, count = check_base("ties", specs, compute_dtype), len(specs) - 1
    held = dtypes.arithmetic(compute)
    factors = factors or [1.0] * count
    check_per_tensor("ties", "weights", weights, count)
    check_per_tensor("ties", "factors", factors, count)
    return {
        "weights": [dtypes.round_to(compute, w) for w in weights],
        "factors": [dtypes.round_to(held, f) for f in factors],
        **check_selection("ties", specs, **selection),
        "normalize": normalize,
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
    normalize: bool,
    scale: float,
    compute_dtype: DType,
    **selection: Any,
) -> torch.Tensor:
    """The formula in plain torch: tensors of the compute dtype round as the formula says."""
    import torch

    compute, held = compute_dtype.to_torch(), dtypes.arithmetic(compute_dtype).to_torch()
    terms = weighted(kept(tensors, compute_dtype, **selection), weights, factors, compute_dtype)

    def total(values: list[torch.Tensor]) -> torch.Tensor:
        found = torch.zeros_like(values[0])
        for value in values:
            found = found + value
        return found.to(compute)

    sign = torch.where(total(terms) >= 0, 1.0, -1.0).to(held)
    agrees = [(term * sign > 0).to(held) for term in terms]
    merged = total([t * a for t, a in zip(terms, agrees)])
    if normalize:
        divisor = total([a * w for a, w in zip(agrees, weights)])
        merged = (merged.to(held) / torch.where(divisor == 0, 1.0, divisor.to(held))).to(compute)
    if scale != 1.0:
        merged = (merged.to(held) * scale).to(compute)
    base = tensors[0].to(compute)
    return base + merged.view(base.shape)


def run_native(
    tensors: Sequence[View],
    out: View,
    threads: int,
    *,
    weights: Sequence[float],
    factors: Sequence[float],
    normalize: bool,
    scale: float,
    compute_dtype: DType,
    **selection: Any,
) -> None:
    """The C++ kernel, ``csrc/cpu/ties.cpp``."""
    views = [t.raw() for t in tensors]
    chosen = (*native_selection(selection), *native_ranks(selection))
    native.module().ties(views, weights, factors, chosen, normalize, scale, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="ties",
    arguments=f"float[] weights, float[] factors=[], {SELECTION}, bool normalize=True, float scale=1.0, "
    "ScalarType? compute_dtype=None, ScalarType? out_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    positional=True,
)


def ties(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    factors: Sequence[float] = (),
    normalize: bool = True,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    threads: int = 0,
    **selection: Any,
) -> torch.Tensor:
    """Merge what is kept of task vectors by elected signs.

    Args:
        base: the base model's tensor.
        tensors: n >= 1 tensors of its shape; bfloat16, float16, float32, float64, mixed as you like.
        weights: n numbers, rounded to ``compute_dtype``.
        factors: n numbers that what is kept of the task vectors is multiplied by; default: 1.
        normalize: divide by the sum of the weights that agree with the elected sign.
        scale: the merged task vector is multiplied by it (lambda).
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
        "normalize": normalize,
        "scale": scale,
        "compute_dtype": compute_dtype,
        **selection,
    }
    if out is None:
        arguments["out_dtype"] = out_dtype
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)
