"""Methods that draw random numbers against mergekit 0.1.5: other numbers, the same statistics over several seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import seme

from ..checkpoints import read
from .oracle import Oracle

Models = Callable[[str, str, str], Path]
SEEDS = range(8)

METHODS = {
    "dare_linear": "{density: 0.3}",
    "dare_ties": "{density: 0.3}",
}
RANKED = {
    "della": "{density: 0.3, epsilon: 0.2, normalize: false}",
    "della_linear": "{density: 0.3, epsilon: 0.2}",
}


def text(method: str, models: Models, experts: str, parameters: str) -> str:
    entries = ", ".join(
        f"{{model: {models('wide', m, 'bfloat16')}, parameters: {{weight: {0.5 + i / 4}}}}}"
        for i, m in enumerate(experts)
    )
    base = models("wide", "base", "bfloat16")
    return (
        f"merge_method: {method}\nmodels: [{entries}]\nbase_model: {base}\nparameters: {parameters}\ndtype: float32\n"
    )


def largest(tensors: dict[str, torch.Tensor]) -> str:
    """Name of the largest matrix."""
    return max(tensors, key=lambda n: tensors[n].numel() if tensors[n].dim() == 2 else 0)


def width(models: Models) -> int:
    """Elements in a row of the largest matrix."""
    base = read(models("wide", "base", "bfloat16"))
    return base[largest(base)].shape[1]


def runs(
    recipe: str, experts: str, models: Models, oracle: Oracle, folder: Path
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """What the first expert changed; and how the merged models of seme and of mergekit differ from the base for every
    seed, [seeds, elements], of the largest matrix."""
    base, expert = (read(models("wide", m, "bfloat16")) for m in ("base", experts[0]))
    name = largest(base)
    origin = base[name].float()

    def change(merged: Path) -> torch.Tensor:
        return (read(merged)[name].float() - origin).reshape(-1)

    mine, other = [], []
    for seed in SEEDS:
        theirs = folder / f"mergekit-{seed}"
        with oracle.merging(recipe, theirs, copy_tokenizer=False, random_seed=seed + 1):
            ours = seme.merge(recipe, folder / f"seme-{seed}", seed=seed).path
        mine.append(change(ours))
        other.append(change(theirs))
    return [(expert[name].float() - origin).reshape(-1)], torch.stack(mine), torch.stack(other)


@pytest.mark.parametrize("method", METHODS)
def test_kept_share_norm_and_mean_of_one_expert(
    method: str, model: Models, default_oracle: Oracle, tmp_path: Path
) -> None:
    recipe = text(method, model, "a", METHODS[method])
    (delta,), *both = runs(recipe, "a", model, default_oracle, tmp_path)
    delta = 0.5 * delta  # its weight
    changed = delta != 0
    count, density, seeds = int(changed.sum()), 0.3, len(SEEDS)
    assert count > 20_000
    for found in both:
        assert not found[:, ~changed].any()
        # Five standard deviations of a mean of independent draws.
        share = float((found[:, changed] != 0).double().mean())
        assert abs(share - density) < 5 * math.sqrt(density * (1 - density) / (count * seeds))
        # base + delta is rounded to float32, far below the delta, at random.
        for row in found:
            assert float(row.double().abs().sum()) == pytest.approx(float(delta.double().abs().sum()), rel=1e-4)
        # Kept with probability p and scaled by about 1/p, a value has variance (1 - p) / p: the mean over the seeds is
        # off by that over the seeds, on average over the elements. 5 %: the elements' own deviations, and the factor's.
        off = (found[:, changed].double().mean(0) - delta[changed]).square().sum()
        expected = delta[changed].double().square().sum() * (1 - density) / density / seeds
        assert float(off / expected) == pytest.approx(1, rel=0.05)
    # Seeds differ, and so do the elements that are kept by each.
    assert len({tuple((row != 0).nonzero()[:50].flatten().tolist()) for row in both[0]}) == seeds


@pytest.mark.parametrize("method", RANKED)
def test_share_by_rank_and_norm_of_one_expert(
    method: str, model: Models, default_oracle: Oracle, tmp_path: Path
) -> None:
    """In ten classes of ranks: both tools keep what the probabilities say."""
    recipe = text(method, model, "a", RANKED[method])
    (delta,), *both = runs(recipe, "a", model, default_oracle, tmp_path)
    delta = 0.5 * delta  # its weight
    rows = delta.abs().reshape(-1, width(model))
    ordered = rows.sort(dim=1).values
    # Of equal magnitudes any may have the lower rank: on average they have the rank in the middle.
    ranks = (torch.searchsorted(ordered, rows) + torch.searchsorted(ordered, rows, right=True) - 1) / 2
    part = (ranks / (rows.shape[1] - 1)).double().reshape(-1)
    chance = 0.3 - 0.2 + 2 * 0.2 * part
    for found in both:
        for tenth in range(10):
            chosen = (delta != 0) & (part >= tenth / 10) & (part < (tenth + 1) / 10)
            if int(chosen.sum()) < 1000:  # most of the smallest are zero, of which nobody sees whether they are kept
                continue
            kept, count = (found[:, chosen] != 0).double(), int(chosen.sum())
            expected = chance[chosen]
            # Five standard deviations of a mean of independent draws.
            deviation = math.sqrt(float((expected * (1 - expected)).sum()) / len(SEEDS)) / count
            assert abs(float(kept.mean() - expected.mean())) < 5 * deviation
        for row in found:  # base + delta is rounded to float32, far below the delta, at random
            assert float(row.double().abs().sum()) == pytest.approx(float(delta.double().abs().sum()), rel=1e-4)


@pytest.mark.parametrize("method", METHODS | RANKED)
def test_the_same_distribution_of_three_experts(
    method: str, model: Models, default_oracle: Oracle, tmp_path: Path
) -> None:
    """The means over the seeds of both tools differ by what their variances make them differ, and those are equal."""
    recipe = text(method, model, "abc", (METHODS | RANKED)[method])
    _, mine, other = runs(recipe, "abc", model, default_oracle, tmp_path)
    variance = [found.double().var(0).sum() for found in (mine, other)]
    assert float(variance[0] / variance[1]) == pytest.approx(1, rel=0.05)
    difference = (mine.double().mean(0) - other.double().mean(0)).square().sum()
    # A bias of a tenth of the standard deviation of one merge would add 0.04 (8 seeds, two tools).
    assert float(difference * len(SEEDS) / sum(variance)) == pytest.approx(1, rel=0.04)
