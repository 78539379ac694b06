"""The merge of SCE: select positions by variance, erase what disagrees with the elected sign, average the rest.

Wan et al. 2024, arXiv 2408.07990, with mergekit's order of operations. With R the rounding to ``compute_dtype`` and
``d_i`` the part of ``R(x_i - b)`` at selected positions (:mod:`seme.ops._variance`): the elected sign is plus where
``R(sum_i d_i) >= 0``, else minus; with sums over the ``d_i`` that have it, ``R(b + R(R(sum R(c_i d_i)) /
max(R(sum c_i), R(1e-6))))``. Sums are held in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.native import View
from seme.ops._op import Op, Params, Spec, check_per_tensor
from seme.ops._task_vectors import check_base
from seme.ops._variance import check_selection, selected

if TYPE_CHECKING:
    import torch

LEAST_DIVISOR = 1e-6


def check(
    specs: Sequence[Spec],
    *,
    coefficients: Sequence[float],
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType | None = None,
    out_dtype: DType | None = None,
) -> Params:
    """Equal shapes; a coefficient per task vector, one threshold and quota."""
    compute = check_base("sce", specs, compute_dtype)
    check_per_tensor("sce", "coefficients", coefficients, len(specs) - 1)
    found, quotas = check_selection("sce", thresholds, tie_quotas)
    return {
        "coefficients": [dtypes.round_to(compute, c) for c in coefficients],
        "thresholds": found,
        "tie_quotas": quotas,
        "compute_dtype": compute,
        "out_dtype": out_dtype or dtypes.promote([s.dtype for s in specs]),
    }


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """Shape of the inputs in ``out_dtype`` (default: the promoted dtype of the inputs)."""
    return Spec(specs[0].shape, params["out_dtype"])


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    coefficients: Sequence[float],
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
) -> torch.Tensor:
    """The formula in plain torch: tensors of the compute dtype round as the formula says."""
    import torch

    compute, held = compute_dtype.to_torch(), dtypes.arithmetic(compute_dtype).to_torch()
    found = selected(tensors, thresholds, tie_quotas, compute_dtype)

    def total(values: Sequence[torch.Tensor]) -> torch.Tensor:
        result = torch.zeros(values[0].shape, dtype=held, device=values[0].device)
        for value in values:
            result = result + value.to(held)
        return result.to(compute)

    sign = torch.where(total(found) >= 0, 1.0, -1.0).to(held)
    agrees = [(d.to(held) * sign > 0).to(held) for d in found]
    merged = total([(d * c).to(held) * a for d, c, a in zip(found, coefficients, agrees)])
    divisor = total([a * c for a, c in zip(agrees, coefficients)])
    least = torch.tensor(LEAST_DIVISOR, dtype=held).to(compute)
    divisor = torch.where(divisor < least, least, divisor)
    base = tensors[0].to(compute)
    return base + (merged.to(held) / divisor.to(held)).to(compute).view(base.shape)


def run_native(
    tensors: Sequence[View],
    out: View,
    threads: int,
    *,
    coefficients: Sequence[float],
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
) -> None:
    """The C++ kernel, ``csrc/cpu/sce.cpp``."""
    views, selection = [t.raw() for t in tensors], (thresholds[0], tie_quotas[0])
    native.module().sce(views, coefficients, *selection, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="sce",
    arguments="float[] coefficients, int[] thresholds, int[] tie_quotas, ScalarType? compute_dtype=None, "
    "ScalarType? out_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
)


def sce(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    *,
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Merge task vectors at the positions where they vary most, by elected signs.

    Args:
        base: the base model's tensor.
        tensors: n >= 1 tensors of its shape; bfloat16, float16, float32, float64, mixed as you like.
        coefficients: n numbers, rounded to ``compute_dtype``.
        thresholds: one variance key for all of them; positions above are selected. 0, with a quota of 2^62, selects
            all.
        tie_quotas: one number: of the positions equal to the threshold, how many are selected, in element order.
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
    arguments = {
        "coefficients": list(coefficients),
        "thresholds": list(thresholds),
        "tie_quotas": list(tie_quotas),
        "compute_dtype": compute_dtype,
    }
    if out is None:
        arguments["out_dtype"] = out_dtype
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)
