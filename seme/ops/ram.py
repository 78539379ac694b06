"""The merge of RAM: what one model changes is added, of what several change the mean.

Xia et al. 2026, arXiv 2601.13572, with mergekit's order of operations. With R the rounding to ``compute_dtype`` and
``d_i = R(x_i - b)``: model i changes an element if ``|d_i| > epsilon`` (or it is NaN), c models do. The merged task
vector is the sum over those of ``scale_i d_i`` where c = 1, else of ``R(d_i / c)``, held in float32 (float64 for
float64). The result is ``R(b + R(sum))``, or with ``rounded=False`` ``b + sum``, which is rounded when it is stored.
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
    scales: Sequence[float],
    epsilon: float,
    rounded: bool = True,
    compute_dtype: DType | None = None,
    out_dtype: DType | None = None,
) -> Params:
    """Equal shapes, a scale per task vector."""
    compute = check_base("ram", specs, compute_dtype)
    check_per_tensor("ram", "scales", scales, len(specs) - 1)
    held = dtypes.arithmetic(compute)
    return {
        "scales": [dtypes.round_to(held, s) for s in scales],
        "epsilon": dtypes.round_to(compute, epsilon),
        "rounded": rounded,
        "compute_dtype": compute,
        "out_dtype": out_dtype or dtypes.promote([s.dtype for s in specs]),
    }


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """Shape of the inputs in ``out_dtype`` (default: the promoted dtype of the inputs)."""
    return Spec(specs[0].shape, params["out_dtype"])


def changes(delta: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Where a task vector changes the base."""
    return ~((delta >= -epsilon) & (delta <= epsilon))


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    scales: Sequence[float],
    epsilon: float,
    rounded: bool,
    compute_dtype: DType,
) -> torch.Tensor:
    """The formula in plain torch: tensors of the compute dtype round as the formula says."""
    import torch

    compute, held = compute_dtype.to_torch(), dtypes.arithmetic(compute_dtype).to_torch()
    found = deltas(tensors, compute_dtype)
    masks = [changes(d, epsilon) for d in found]
    count = torch.stack(masks).sum(0)
    total = torch.zeros(count.shape, dtype=held, device=count.device)
    for delta, mask, scale in zip(found, masks, scales):
        part = torch.where(mask, delta, torch.zeros_like(delta)).to(held)
        shared = (part / count.clamp(min=1)).to(compute).to(held)
        total = total + torch.where(count > 1, shared, part * scale)
    base = tensors[0].to(compute).reshape(-1)
    merged = base + total.to(compute) if rounded else base.to(held) + total
    return merged.view(tensors[0].shape)


def run_native(
    tensors: Sequence[View],
    out: View,
    threads: int,
    *,
    scales: Sequence[float],
    epsilon: float,
    rounded: bool,
    compute_dtype: DType,
) -> None:
    """The C++ kernel, ``csrc/cpu/ram.cpp``."""
    views = [t.raw() for t in tensors]
    native.module().ram(views, scales, epsilon, rounded, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="ram",
    arguments="float[] scales, float epsilon, bool rounded=True, ScalarType? compute_dtype=None, "
    "ScalarType? out_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
)


def ram(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    scales: Sequence[float],
    *,
    epsilon: float,
    rounded: bool = True,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Add what one model changes, and the mean of what several change.

    Args:
        base: the base model's tensor.
        tensors: n >= 1 tensors of its shape; bfloat16, float16, float32, float64, mixed as you like.
        scales: n numbers that what a model alone changes is multiplied by.
        epsilon: a task vector of at most this magnitude changes nothing; rounded to ``compute_dtype``.
        rounded: whether the merged task vector and the result are rounded to ``compute_dtype``.
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
    arguments = {"scales": list(scales), "epsilon": epsilon, "rounded": rounded, "compute_dtype": compute_dtype}
    if out is None:
        arguments["out_dtype"] = out_dtype
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)
