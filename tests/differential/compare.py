"""How far two merged checkpoints are apart, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load_file

from seme.methods import Method
from seme.plan import TensorPlan

from .selections import by_importance, by_variance, energy_at_stake

MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
LEAST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126, torch.float64: -1022}


_load_file = lru_cache(maxsize=64)(load_file)
"""The models that are merged are read again and again."""


def inputs(plan: TensorPlan) -> list[torch.Tensor]:
    """A tensor in every input model, as stored, in the plan's order."""
    return [_load_file(source.file)[source.name] for source in plan.sources]


@dataclass
class Distance:
    """Counts over the elements of tensors.

    Attributes:
        differing: elements that differ, ``ties`` aside.
        worst: their largest difference, in ulps of the larger of the two values.
        outside: how many of them are not explained by :func:`allowance`.
        ties: elements that a selection leaves open, see :func:`undecided`.
        differing_ties: how many of those differ.
    """

    tensors: int = 0
    elements: int = 0
    differing: int = 0
    worst: float = 0.0
    outside: int = 0
    ties: int = 0
    differing_ties: int = 0

    def add(self, other: Distance) -> None:
        """Take in another count."""
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "worst" else mine + value)


def distance(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    allowed: tuple[torch.Tensor, torch.Tensor] | None = None,
    ties: torch.Tensor | None = None,
) -> Distance:
    """Compare two tensors of one shape and dtype. -0 equals 0, a NaN equals a NaN; values that differ must both lie in
    the interval ``allowed``, if there is one."""
    a, b = ours.reshape(-1).double(), theirs.reshape(-1).double()
    differs = ~((a == b) | (a.isnan() & b.isnan()))
    found = Distance(1, a.numel())
    if ties is not None:
        ties = ties.reshape(-1)
        found.ties, found.differing_ties = int(ties.sum()), int((differs & ties).sum())
        differs = differs & ~ties
    found.differing = found.outside = int(differs.sum())
    if found.differing:
        a, b = a[differs], b[differs]
        found.worst = float(((a - b).abs() / ulp(torch.maximum(a.abs(), b.abs()), ours.dtype)).max())
        if allowed is not None:
            low, high = (t.reshape(-1)[differs] for t in allowed)
            inside = (torch.minimum(a, b) >= low) & (torch.maximum(a, b) <= high)
            found.outside = int((~inside).sum())
    return found


def ulp(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbours of ``dtype`` at float64 magnitudes."""
    exponent = torch.frexp(magnitude)[1] - 1
    exponent = torch.where(magnitude > 0, exponent, LEAST_EXPONENT[dtype]).clamp(min=LEAST_EXPONENT[dtype])
    return torch.ldexp(torch.ones_like(magnitude), exponent - MANTISSA[dtype])


SPHERES = ("karcher", "model_stock", "multislerp", "nuslerp")
"""Methods that work with angles in the compute dtype in mergekit."""

CUT = ("ties", "breadcrumbs", "breadcrumbs_ties")
"""Methods that cut task vectors by magnitude."""


def kept_count(density: float, numel: int) -> int:
    """Elements that a trim to a density in (0, 1) keeps."""
    return max(1, int(density * numel))


def cuts(method: str, arguments: Mapping[str, Any], numel: int) -> list[tuple[int, ...]]:
    """For each expert the ranks, by falling magnitude, after which ``method`` keeps or drops something else."""
    found: list[tuple[int, ...]] = []
    for i, density in enumerate(arguments["density"]):
        if not 0 < density < 1 or numel == 0:
            found.append(())
        elif method == "ties":
            found.append((kept_count(density, numel),))
        else:
            kept = int(density * numel)
            outliers = min(int(arguments["gamma"][i] * numel), numel - kept)
            found.append((outliers, outliers + kept) if kept else ())
    return found


def undecided(method: Method, plan: TensorPlan, tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """The elements that the selection of a method leaves open; None for methods that select nothing.

    Of a cut by magnitude those whose magnitude is the k-th largest of a
    task vector where that magnitude occurs more often than k allows. (At magnitude 0 keeping and dropping are one.)
    """
    if method.name == "sce" and plan.group.experts:
        return by_variance(plan, tensors)
    if method.name == "arcee_fusion":
        return by_importance(plan, tensors)
    if method.name not in CUT:
        return None
    compute = plan.group.compute_dtype.to_torch()
    assert plan.group.base is not None
    base = tensors[plan.group.base].to(compute)
    mask = torch.zeros(base.shape, dtype=torch.bool)
    for expert, ranks in zip(plan.group.experts, cuts(method.name, plan.arguments, base.numel())):
        magnitude = (tensors[expert].to(compute) - base).abs()
        for k in ranks:
            if k == 0:
                continue
            threshold = magnitude.reshape(-1).double().topk(k).values[-1]
            if threshold > 0 and int((magnitude >= threshold).sum()) > k:
                mask |= magnitude == threshold
    return mask


def allowance(
    method: Method, plan: TensorPlan, tensors: list[torch.Tensor], fused: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Where results may lie that differ, as an interval around the formula's value in float64; None: none may.

    ``fused`` says whether torch uses fused multiply-adds.

    - ``nearswap``, ``passthrough``, ``task_arithmetic``, ``ties``, ``breadcrumbs``: none. Both tools do the same
      operations in the same order, each rounded.
    - ``ties`` and ``breadcrumbs`` with ``rescale`` in float32 or float64: the L1 norms are sums over a whole tensor,
      exact in seme, in the working dtype in mergekit. Terms of one sign, added pairwise, come out a few eps off; so
      does their quotient, and the merged task vector with it. In bfloat16 and float16 the norms are rounded so far
      that they are equal.
    - ``linear``: none without fused multiply-adds. With them torch's addcmul, which mergekit adds with, does not round
      the products, and so the sums differ in the last bits.
    - ``slerp``: mergekit computes norms, inner product and coefficients in float32 (float64 for float64), seme in
      float64 with an exact sum. The coefficients are smooth functions of the inner product, hence a few eps apart,
      and sqrt(n) / 8 eps for the errors of n added squares, a random walk.
    - ``nuslerp``, ``multislerp``, ``karcher``, ``model_stock``: as ``slerp``, but mergekit works in the compute dtype
      and rounds unit vectors, angles and every product to it (torch holds sums in float32, and rounds them once). So
      the few eps are those of the compute dtype, and with 16 bits there is no random walk.

    - ``ram``, ``ramplus_tl``, ``arcee_fusion``: none.
    - ``sce``: a coefficient is a quotient of mean squares, which mergekit sums up in the working dtype: a few eps, in
      bfloat16 and float16 one rounding of it. It moves the mean of the task vectors by no more than that, relative to
      them; so does what the selection leaves open.

    Relative to the terms that are added these are small distances. Relative to a sum in which they cancel they are not:
    the elements of the table's worst distances, of hundreds of ulps with 16 bits and of thousands with more, are those
    whose base and task vector, or directions, nearly cancel. As a whole, and away from what a selection leaves open,
    seme is no farther from the formula in float64 than mergekit is; a test compares them.

    The ends of the interval are rounded as results are. So where the arithmetic is float32 and the results bfloat16,
    only those few elements may differ between whose two values a rounding boundary lies, and by one ulp.
    """
    arguments, compute = plan.arguments, plan.group.compute_dtype.to_torch()
    work = torch.float64 if compute == torch.float64 else torch.float32
    held = [t.to(compute).double() for t in tensors]
    if method.name == "linear" and fused:
        size = sum(abs(w) * t.abs() for w, t in zip(arguments["weight"], held))
        size = size / abs(sum(arguments["weight"])) if arguments["normalize"] else size
        roundings = len(held) + 1.0
    elif method.name == "slerp":
        size = sum(t.abs() for t in held)
        roundings = 8 + math.sqrt(plan.group.numel) / 8
    elif method.name in SPHERES:
        size = _directed_size(method, plan, held)
        roundings = 8 + (math.sqrt(plan.group.numel) / 8 if compute == work else 0)
    elif method.name in CUT and arguments["rescale"] and compute == work and min(arguments["density"]) < 1:
        size = _rescaled_size(method, plan, held)
        roundings = 8.0
    elif method.name == "sce" and plan.group.experts:
        base = held[plan.group.base]  # type: ignore[index]
        size = torch.stack([(held[i] - base).abs() for i in plan.group.experts]).sum(0)
        roundings = 16.0 if compute == work else 2 * torch.finfo(compute).eps / torch.finfo(work).eps
        roundings += 2 * energy_at_stake(plan, tensors) / torch.finfo(work).eps
    else:
        return None
    of_compute = torch.finfo(compute if method.name in SPHERES else work)
    error = roundings * of_compute.eps * (size + of_compute.smallest_normal)
    value = method.reference(held, base=plan.group.base, **arguments)
    out = plan.group.out_dtype.to_torch()
    low, high = ((value + e).to(work).to(compute).to(out).double() for e in (-error, error))
    return low, high


def _directed_size(method: Method, plan: TensorPlan, held: list[torch.Tensor]) -> torch.Tensor:
    """How large base, terms and result can be. Two of the methods add directions at the mean length, for which a short
    vector is made as long as the longest."""
    size = sum((t.abs() for t in held), start=torch.zeros_like(held[0]))
    if method.name not in ("karcher", "multislerp"):
        return size
    base = plan.group.base
    vectors = [t if base is None else t - held[base] for i, t in enumerate(held) if i != base]
    longest = max(v.norm() for v in vectors)
    return size + torch.stack([v.abs() * longest / v.norm().clamp(min=1e-30) for v in vectors]).sum(0)


def _rescaled_size(method: Method, plan: TensorPlan, held: list[torch.Tensor]) -> torch.Tensor:
    """How large base, scaled task vectors and result can be."""
    arguments = plan.arguments
    assert plan.group.base is not None
    assert min(arguments["weight"]) > 0, "negative weights can cancel in the divisor, then this is no bound"
    base = held[plan.group.base]
    moves = []
    ranks = cuts(method.name, arguments, base.numel())
    for i, w, cut in zip(plan.group.experts, arguments["weight"], ranks):
        size = (held[i] - base).abs()
        falling = size.reshape(-1).sort(descending=True).values
        begin, end = (0, base.numel()) if not cut else cut if len(cut) == 2 else (0, *cut)
        kept = float(falling[begin:end].sum())
        moves.append(w * size * (float(falling.sum()) / kept if kept else 1.0))
    divisor = min(arguments["weight"]) if arguments["normalize"] else 1.0
    return base.abs() + abs(arguments["lambda_"]) * torch.stack(moves).sum(0) / divisor
