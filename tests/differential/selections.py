"""The elements that the selections of SCE and Arcee Fusion leave open, because mergekit's own arithmetic does."""

from __future__ import annotations

import torch

from seme.methods.sce import selected_count
from seme.ops._task_vectors import magnitude_keys
from seme.ops._variance import variance
from seme.ops.row_divergence import OP as ROW_DIVERGENCE
from seme.plan import TensorPlan

DIVERGENCE = 4 * 2.0**-23
"""How far mergekit's float32 divergence of a row may be off: softmax and logarithm are known to a few eps, the
divergence is what is left of them."""
RANKS = 0.003
"""How far quantiles of a random sample of 10^6 may be off, as ranks: six standard deviations."""


def by_variance(plan: TensorPlan, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Positions whose variance is the k-th largest or its neighbour (mergekit updates mean and variance one by one, so
    the last bit may differ), if there are several of them."""
    deltas = [d.reshape(-1) for d in _deltas(plan, tensors)]
    mask = torch.zeros(deltas[0].shape, dtype=torch.bool)
    keys = magnitude_keys(variance(deltas))
    count = selected_count(plan.arguments["select_topk"], int((keys > 0).sum()))
    if plan.arguments["select_topk"] < 1 and count > 0:
        near = (keys - keys.topk(count).values[-1]).abs() <= 1
        if near.sum() > 1:
            mask = near
    return mask.reshape(tensors[0].shape)


def energy_at_stake(plan: TensorPlan, tensors: list[torch.Tensor]) -> float:
    """How far a coefficient may be off, relative to itself, because of :func:`by_variance`."""
    open_ = by_variance(plan, tensors)
    if not open_.any():
        return 0.0
    deltas = _deltas(plan, tensors)
    keys = magnitude_keys(variance([d.reshape(-1) for d in deltas]))
    chosen = keys >= keys.topk(selected_count(plan.arguments["select_topk"], int((keys > 0).sum()))).values[-1]
    shares = []
    for delta in deltas:
        squares = delta.double().square().reshape(-1)
        total = float((squares * chosen).sum())
        shares.append(float((squares * open_.reshape(-1)).sum()) / total if total else 0.0)
    return max(shares)


def by_importance(plan: TensorPlan, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Elements whose importance lies on either side of the threshold within the error of mergekit's divergences."""
    assert plan.group.base is not None
    compute = plan.group.compute_dtype.to_torch()
    base, other = (tensors[i].to(compute).double() for i in (plan.group.base, 1 - plan.group.base))
    size = (other - base).abs()
    if size.numel() == 0:
        return torch.zeros(size.shape, dtype=torch.bool)
    row, lines = (size.shape[-1], (*size.shape[:-1], 1)) if size.dim() else (1, ())
    call = {"row": row, "rounded": compute.itemsize == 2, "compute_dtype": plan.group.compute_dtype}
    divergence = ROW_DIVERGENCE.reference([base, other], **call).reshape(lines)
    error: torch.Tensor | float = DIVERGENCE if compute == torch.float32 else 1e-15
    if compute.itemsize == 2:
        error = _fragile(base, other, compute) * torch.finfo(compute).eps
    low, high = size * (divergence - error), size * (divergence + error)

    def quantile(values: torch.Tensor, q: float) -> float:
        n = values.numel()
        return float(values.reshape(-1).sort().values[int(min(max(q, 0), 1) * (n - 1))])

    slack = RANKS if size.numel() > 1_000_000 else 0.0
    q1 = quantile(low, 0.25 - slack), quantile(high, 0.25 + slack)
    median = quantile(low, 0.5 - slack), quantile(high, 0.5 + slack)
    q3 = quantile(low, 0.75 - slack), quantile(high, 0.75 + slack)
    least, most = median[0] + 1.5 * (q3[0] - q1[1]), median[1] + 1.5 * (q3[1] - q1[0])
    return (high >= least) & (low < most)


def _fragile(base: torch.Tensor, other: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """Per row its largest softmax, if a float32 result that is a few eps off is rounded to another 16-bit number there;
    else 0. Such a row's divergence differs by one rounding of a term."""
    slack = 4 * 2.0**-23

    def flips(x: torch.Tensor) -> torch.Tensor:
        return (x * (1 - slack)).to(compute) != (x * (1 + slack)).to(compute)

    p, q = (torch.softmax(t, dim=-1) for t in (other, base))
    a, b = ((t.to(compute).double() + 1e-8).to(compute).double() for t in (p, q))
    logarithm = torch.log((a / b).to(compute).double())
    total = (a * logarithm.to(compute).double()).to(compute).double()
    last = total.sum(-1, keepdim=True)
    off = slack * total.abs().sum(-1, keepdim=True)
    open_ = (flips(p) | flips(q) | flips(logarithm)).any(-1, keepdim=True)
    open_ |= (last - off).to(compute) != (last + off).to(compute)
    return open_ * p.amax(-1, keepdim=True)


def _deltas(plan: TensorPlan, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    compute = plan.group.compute_dtype.to_torch()
    assert plan.group.base is not None
    base = tensors[plan.group.base].to(compute)
    return [tensors[i].to(compute) - base for i in plan.group.experts]
