"""How far two merged checkpoints are apart, and how far they may be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

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
    not count them, ``differing_ties`` does. ``ratio`` is the largest difference over what is allowed, and infinite
    where nothing is.
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


@dataclass(frozen=True)
class Allowance:
    """A difference that is allowed: per element an absolute error, and where the results have been rounded to a dtype
    narrower than the arithmetic's one ulp of it more, because a rounding boundary may lie between them."""

    error: torch.Tensor
    narrow: torch.dtype | None


def distance(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    allowed: Allowance | None = None,
    ties: torch.Tensor | None = None,
) -> Distance:
    """Compare two tensors of one shape and dtype; -0 equals 0, a NaN equals a NaN."""
    a, b = ours.reshape(-1).double(), theirs.reshape(-1).double()
    differs = ~((a == b) | (a.isnan() & b.isnan()))
    found = Distance(1, a.numel())
    if ties is not None:
        ties = ties.reshape(-1)
        found.ties, found.differing_ties = int(ties.sum()), int((differs & ties).sum())
        differs = differs & ~ties
    found.differing = int(differs.sum())
    if found.differing:
        gap, larger = (a - b).abs()[differs], torch.maximum(a.abs(), b.abs())[differs]
        found.worst = float((gap / ulp(larger, ours.dtype)).max())
        limit = torch.zeros_like(gap)
        if allowed is not None:
            limit = allowed.error.reshape(-1)[differs]
            if allowed.narrow is not None:
                limit = limit + ulp(larger, allowed.narrow)
        found.ratio = float((gap / limit).nan_to_num(nan=torch.inf).max())
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


def allowance(method: str, plan: TensorPlan, tensors: list[torch.Tensor]) -> Allowance | None:
    """What the results of seme and mergekit may differ by; None: nothing.

    - ``task_arithmetic``, ``ties``: nothing. Both tools do the same operations in the same order, each rounded.
    - ``ties`` with ``rescale`` in float32 or float64: the L1 norms are sums over a whole tensor, exact in seme, in the
      working dtype in mergekit. Terms of one sign, added pairwise, come out a few eps off; so does their quotient, and
      the merged task vector with it. In bfloat16 and float16 the norms are rounded so far that they are equal.
    - ``linear``: mergekit adds with torch's addcmul, which fuses multiplication and addition where the processor can;
      seme rounds the product first. That is half an eps of each product, and so of the sums.
    - ``slerp``: mergekit computes the two coefficients in float32 from a float32 inner product, seme in float64. They
      are smooth functions of it, so a few eps apart; the sum is fused as above.
    """
    arguments, compute, out = plan.arguments, plan.group.compute_dtype.to_torch(), plan.group.out_dtype.to_torch()
    work = torch.float64 if compute == torch.float64 else torch.float32
    held = [t.to(compute).double() for t in tensors]
    if method == "linear":
        size = sum(abs(w) * t.abs() for w, t in zip(arguments["weight"], held))
        size = size / abs(sum(arguments["weight"])) if arguments["normalize"] else size
        roundings = len(held) + 2
    elif method == "slerp":
        size = sum(t.abs() for t in held)
        roundings = 8
    elif method == "ties" and arguments["rescale"] and compute == work and min(arguments["density"]) < 1:
        size = _rescaled_size(plan, held)
        roundings = 8
    else:
        return None
    assert isinstance(size, torch.Tensor)
    narrowest = min(compute, out, key=MANTISSA.__getitem__)
    return Allowance(roundings * torch.finfo(work).eps * size, narrowest if narrowest != work else None)


def _rescaled_size(plan: TensorPlan, held: list[torch.Tensor]) -> torch.Tensor:
    """How large the scaled task vector and the result can be. What a trim keeps has at least the share ``density`` of
    the L1 norm, so the factors are at most 1 / density."""
    arguments = plan.arguments
    assert plan.group.base is not None
    assert min(arguments["weight"]) > 0, "negative weights can cancel in the divisor, then this is no bound"
    base = held[plan.group.base]
    moves = [
        w * (held[i] - base).abs() / max(d, 1 / base.numel())
        for i, w, d in zip(plan.group.experts, arguments["weight"], arguments["density"])
        if d > 0
    ]
    total = torch.stack(moves).sum(0) if moves else 0 * base
    divisor = min(arguments["weight"]) if arguments["normalize"] else 1.0
    return base.abs() + abs(arguments["lambda_"]) * total / divisor
