"""How far two merged checkpoints are apart, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from seme.methods._magnitude import kept_count
from seme.plan import TensorPlan

MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
LEAST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126, torch.float64: -1022}


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 - not a mapping
    return tensors


def inputs(plan: TensorPlan) -> list[torch.Tensor]:
    """A tensor in every input model, as stored, in the plan's order."""
    found = []
    for source in plan.sources:
        with safe_open(source.file, "pt") as opened:
            found.append(opened.get_tensor(source.name))
    return found


def ulp(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbours of ``dtype`` at float64 magnitudes."""
    exponent = torch.frexp(magnitude)[1] - 1
    exponent = torch.where(magnitude > 0, exponent, LEAST_EXPONENT[dtype]).clamp(min=LEAST_EXPONENT[dtype])
    return torch.ldexp(torch.ones_like(magnitude), exponent - MANTISSA[dtype])


@dataclass
class Distance:
    """Counts over the elements of tensors; ``worst`` is in ulps of the larger of the two values.

    ``ties`` are elements that the trim of TIES leaves open (see :func:`undecided`); ``differing`` and ``worst`` do
    not count them, ``differing_ties`` does. ``ratio`` is the largest difference over its bound, where one is allowed.
    """

    tensors: int = 0
    elements: int = 0
    differing: int = 0
    worst: float = 0.0
    ties: int = 0
    differing_ties: int = 0
    ratio: float = 0.0

    def add(self, other: Distance) -> None:
        """Take in another count."""
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name in ("worst", "ratio") else mine + value)


def distance(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    bound: torch.Tensor | None = None,
    ties: torch.Tensor | None = None,
) -> Distance:
    """Compare two tensors of one shape and dtype; -0 equals 0, a NaN equals a NaN.

    ``bound`` is the difference allowed per element; without it none is, and any difference makes ``ratio`` infinite.
    """
    a, b = ours.reshape(-1).double(), theirs.reshape(-1).double()
    differs = ~((a == b) | (a.isnan() & b.isnan()))
    found = Distance(1, a.numel())
    if ties is not None:
        ties = ties.reshape(-1)
        found.ties, found.differing_ties = int(ties.sum()), int((differs & ties).sum())
        differs = differs & ~ties
    found.differing = int(differs.sum())
    if found.differing:
        gap = (a - b).abs()[differs]
        found.worst = float((gap / ulp(torch.maximum(a.abs(), b.abs())[differs], ours.dtype)).max())
        allowed = torch.zeros_like(gap) if bound is None else bound.reshape(-1)[differs]
        found.ratio = float((gap / allowed).max())
    return found


def undecided(plan: TensorPlan, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The elements of which a trim by magnitude may keep or drop any: those whose magnitude is the k-th largest of a
    task vector where that magnitude occurs more often than k allows. (At magnitude 0 keeping and dropping are one.)
    """
    compute = plan.group.compute_dtype.to_torch()
    assert plan.group.base is not None
    base = tensors[plan.group.base].to(compute)
    mask = torch.zeros(base.shape, dtype=torch.bool)
    for expert, density in zip(plan.group.experts, plan.arguments["density"]):
        if not 0 < density < 1 or base.numel() == 0:
            continue
        magnitude = (tensors[expert].to(compute) - base).abs()
        k = kept_count(density, base.numel())
        threshold = magnitude.reshape(-1).double().topk(k).values[-1]
        if threshold > 0 and int((magnitude >= threshold).sum()) > k:
            mask |= magnitude == threshold
    return mask


def _weighted_sum_bound(factors: list[float], divisor: float, tensors: list[torch.Tensor], eps: float) -> torch.Tensor:
    """Rounding error of a weighted sum: each of the K products, the sums and the quotient contribute half an eps of the
    sum of magnitudes, in either tool, so 2 (K + 2) eps / 2 bounds the difference of two orders of evaluation."""
    total = sum(abs(w) * t.double().abs() for w, t in zip(factors, tensors))
    assert isinstance(total, torch.Tensor)
    return (len(tensors) + 2) * eps * total / abs(divisor)


def bound(method: str, plan: TensorPlan, tensors: list[torch.Tensor]) -> torch.Tensor | None:
    """What the results of seme and mergekit may differ by; None: nothing.

    - ``task_arithmetic``, ``ties``: nothing. Both tools do the same operations in the same order, each rounded.
    - ``ties`` with ``rescale`` in float32 or float64: the two L1 norms are sums over a whole tensor, exact in seme and
      in the working dtype in mergekit. n terms of one sign, added pairwise, are off by a few eps; so is the factor, and
      the merged task vector with it. In bfloat16 and float16 both round the norms, and the factors are equal.
    - ``linear``: mergekit adds with torch's addcmul, which fuses multiplication and addition where the processor
      can; seme rounds the product first. So partial sums differ by half an eps per model.
    - ``slerp``: the two coefficients are computed in float32 from a float32 inner product in mergekit, in float64 in
      seme, so they differ by a few eps (the coefficients are smooth in the inner product); the sum is fused as above.
    """
    group, arguments = plan.group, plan.arguments
    work = torch.float64 if group.compute_dtype.name == "float64" else torch.float32
    eps = torch.finfo(work).eps
    out = group.out_dtype.to_torch()
    compute = group.compute_dtype.to_torch()
    held = [t.to(compute).double() for t in tensors]
    if method == "ties" and arguments["rescale"] and compute == work and any(0 < d < 1 for d in arguments["density"]):
        assert group.base is not None
        base = held[group.base]
        moves = [abs(w) * (held[i] - base).abs() for w, i in zip(arguments["weight"], group.experts)]
        largest = torch.stack(moves).sum(0) * abs(arguments["lambda_"])
        if arguments["normalize"]:
            # The quotient is at most the largest delta as long as no weights cancel in the divisor.
            weights = [abs(w) for w in arguments["weight"]]
            assert all(w > 0 for w in arguments["weight"]), "the bound needs positive weights"
            largest = largest / min(weights)
        factor = max(1 / d for d in arguments["density"] if d > 0)
        exact = 8 * eps * factor * largest + eps * base.abs()
    elif method == "linear":
        divisor = sum(arguments["weight"]) if arguments["normalize"] else 1.0
        exact = _weighted_sum_bound(arguments["weight"], divisor, held, eps)
    elif method == "slerp":
        exact = 8 * eps * sum(t.abs() for t in held)
    else:
        return None
    # Results rounded to a narrower dtype are equal, or neighbours if a rounding boundary lies between them.
    narrow = MANTISSA[out] < MANTISSA[work] or compute != work
    if narrow:
        coarse = out if MANTISSA[out] < MANTISSA[compute] else compute
        return exact + ulp(torch.stack([t.abs() for t in held]).amax(0) * _growth(method, arguments), coarse)
    return exact


def _growth(method: str, arguments: Mapping[str, Any]) -> float:
    raise NotImplementedError
