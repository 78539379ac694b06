"""Published methods that seme does not have, as their papers or official code define them, in float64.

Each takes the base, the experts and its parameters and returns what is to be added to the base (at scale 1). Random
masks come from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch

from benchmarks.quality.models import State


def _by_tensor(merge: Callable[[torch.Tensor], torch.Tensor], base: State, experts: Sequence[State]) -> State:
    """``merge`` of the stacked task vectors [n, ...] of each tensor."""
    return {k: merge(torch.stack([e[k].double() - b.double() for e in experts])) for k, b in base.items()}


def _elected(delta: torch.Tensor) -> torch.Tensor:
    """Mean over those experts whose entry is not zero and has the elected sign, that of the sum (TIES)."""
    agrees = (delta.sign() == delta.sum(0).sign()) & (delta != 0)
    return (delta * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def dare_ties(base: State, experts: Sequence[State], density: float = 0.5, seed: int = 0) -> State:
    """DARE (arXiv 2311.03099) with TIES' election: keep entries at random, divide by the density, elect, average."""
    generator = torch.Generator().manual_seed(seed)

    def merge(delta: torch.Tensor) -> torch.Tensor:
        kept = torch.rand(delta.shape, generator=generator, dtype=torch.float64) < density
        return _elected(delta * kept / density)

    return _by_tensor(merge, base, experts)


def della(base: State, experts: Sequence[State], density: float = 0.5, window: float = 0.2, seed: int = 0) -> State:
    """DELLA (arXiv 2406.11617): in each row the chance to be kept grows with the rank of the magnitude, by ``window``
    from the smallest to the largest; kept entries are divided by their chance; then election and mean.
    """
    generator = torch.Generator().manual_seed(seed)

    def merge(delta: torch.Tensor) -> torch.Tensor:
        last = delta.shape[-1]
        rank = delta.abs().argsort(-1).argsort(-1).double()
        chance = density - window / 2 + window * rank / max(last - 1, 1)
        kept = torch.rand(delta.shape, generator=generator, dtype=torch.float64) < chance
        return _elected(delta * kept / chance)

    return _by_tensor(merge, base, experts)


def sce(base: State, experts: Sequence[State], select: float = 0.1) -> State:
    """SCE (FuseChat, arXiv 2408.07990): coefficients from the energy of the ``select`` fraction of entries with the
    largest variance over experts, entries of minority sign erased. As the official code, the erased sum is over all
    entries, not only the selected ones; merging those alone keeps a tenth of every task vector.
    """

    def merge(delta: torch.Tensor) -> torch.Tensor:
        variance = delta.var(0, unbiased=False).flatten()
        kept = torch.zeros_like(variance)
        kept[variance.topk(max(1, round(select * variance.numel()))).indices] = 1
        energy = (delta.flatten(1).square() * kept).sum(1)
        total = energy.sum()
        eta = energy / total if total > 0 else torch.full_like(energy, 1 / len(energy))
        agrees = (delta.sign() == delta.sum(0).sign()) & (delta != 0)
        weight = eta.view(-1, *[1] * (delta.ndim - 1)) * agrees
        return (weight * delta).sum(0) / weight.sum(0).clamp(min=1e-12)

    return _by_tensor(merge, base, experts)


def model_stock(base: State, experts: Sequence[State]) -> State:
    """Model Stock (arXiv 2403.19522): the mean task vector times ``n c / (1 + (n - 1) c)``, c the mean cosine between
    the experts' task vectors of this tensor.
    """

    def merge(delta: torch.Tensor) -> torch.Tensor:
        flat = delta.flatten(1)
        n = len(flat)
        cosines = [torch.nn.functional.cosine_similarity(flat[i], flat[j], dim=0) for i, j in combinations(range(n), 2)]
        c = torch.stack(cosines).mean()
        return n * c / (1 + (n - 1) * c) * delta.mean(0)

    return _by_tensor(merge, base, experts)
