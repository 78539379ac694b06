"""What is merged and measured: methods, their scales, and one (size, seed) of the grid from texts to losses."""

from __future__ import annotations

import fcntl
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import seme
from benchmarks.common import Results, load
from benchmarks.quality import controls, peers, regmean
from benchmarks.quality.corpus import BASE, DOMAINS, Corpus
from benchmarks.quality.models import State, Trained, batches, loss

STEP = 0.1
EXTRAPOLATION = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)


class Shared(Results):
    """A results file that several processes add to at once."""

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Replace one entry of the file as it is now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if self.path.exists():
                now = load(self.path)
                self.data["runs"] = now["runs"]
                self.data["entries"] = now["entries"]
            super().put(key, entry)
        finally:
            os.close(folder)


@dataclass(frozen=True)
class Case:
    """Experts to be merged onto their base; ``draws`` are sources of each expert's training batches."""

    model: Any
    base: State
    experts: Sequence[State]
    draws: Sequence[Callable[[], torch.Tensor]]

    @cached_property
    def inputs(self) -> list[State]:
        """Second moments of the experts' real inputs."""
        return [regmean.moments(self.model, e, draw) for e, draw in zip(self.experts, self.draws)]

    def api(self, method: str, **parameters: Any) -> State:
        """What seme's method adds to the base."""
        merged = seme.merge_state_dicts([self.base, *self.experts], method, base=0, parameters=parameters)
        return {k: v.double() - self.base[k].double() for k, v in merged.items()}

    def sequence(self) -> State:
        """What rule ``sequence``, which runs the models and so needs folders, adds to the base."""
        from safetensors.torch import load_file, save_file

        with TemporaryDirectory() as folder:
            paths = [Path(folder) / str(i) for i in range(len(self.experts) + 1)]
            for path, state in zip(paths, (self.base, *self.experts)):
                self.model.config.save_pretrained(path)
                save_file(state, path / "model.safetensors", metadata={"format": "pt"})
            recipe = {
                "merge_method": "seme",
                "base_model": str(paths[0]),
                "models": [{"model": str(path)} for path in paths[1:]],
                "parameters": {"rule": "sequence"},
                "dtype": "float32",
            }
            seme.merge(recipe, Path(folder) / "merged", threads=1)
            merged = load_file(Path(folder) / "merged" / "model.safetensors")
        return {k: merged[k].double() - b.double() for k, b in self.base.items()}


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        kind: peer, seme, control or data.
        delta: what it adds to the base at scale 1.
        default: the scale (lambda) that it is used with.
        tuned: also measured at other scales, to find the best.
        fixed: tensors that are merged at scale 1 whatever the scale.
    """

    kind: str
    delta: Callable[[Case], State]
    default: float = 1.0
    tuned: bool = True
    fixed: tuple[str, ...] = ()


INPUT = (controls.EMBEDDING,)
METHODS: dict[str, Method] = {
    "average": Method("peer", lambda c: _mean(c), tuned=False),
    "task arithmetic": Method("peer", lambda c: c.api("task_arithmetic", weight=1.0), default=0.3),
    "TIES": Method("peer", lambda c: c.api("ties", weight=1.0, density=0.5)),
    "DARE-TIES": Method("peer", lambda c: peers.dare_ties(c.base, c.experts)),
    "DELLA": Method("peer", lambda c: peers.della(c.base, c.experts)),
    "SCE": Method("peer", lambda c: peers.sce(c.base, c.experts)),
    "Model Stock": Method("peer", lambda c: peers.model_stock(c.base, c.experts)),
    "TSV-M": Method("peer", lambda c: c.api("tsv_m")),
    "Iso-C": Method("peer", lambda c: c.api("iso_c")),
    "SeMe project": Method("seme", lambda c: c.api("seme")),
    "SeMe elect": Method("seme", lambda c: c.api("seme", rule="elect")),
    "SeMe sequence": Method("seme", lambda c: c.sequence()),
    "project, latent axis": Method("control", lambda c: c.api("seme", axis="latent"), tuned=False),
    "project, not flattened": Method("control", lambda c: _plain(c, 0.0), tuned=False),
    "the same, sigma 0.5": Method("control", lambda c: _plain(c, 0.5), tuned=False),
    "the same, sigma 1": Method("control", lambda c: _plain(c, 1.0), tuned=False),
    "sigma 1, random vectors": Method("control", lambda c: _project(c, "random"), tuned=False),
    "sigma 1, LM-head rows": Method("control", lambda c: _project(c, "head"), tuned=False),
    "sigma 1, embeddings": Method("control", lambda c: _project(c, "embeddings"), tuned=False),
    "elect, random vectors": Method("control", lambda c: _elect(c, "random"), tuned=False),
    "elect, LM-head rows": Method("control", lambda c: _elect(c, "head"), tuned=False),
    "elect, raw coordinates": Method("control", lambda c: _elect(c, "raw"), tuned=False),
    "task arithmetic, drift embeddings": Method("control", lambda c: _drift(c, "task arithmetic"), 0.3, fixed=INPUT),
    "TSV-M, drift embeddings": Method("control", lambda c: _drift(c, "TSV-M"), fixed=INPUT),
    "Iso-C, drift embeddings": Method("control", lambda c: _drift(c, "Iso-C"), fixed=INPUT),
    "project, mean embeddings": Method("control", lambda c: _averaged(c), tuned=False),
    "RegMean with data": Method("data", lambda c: regmean.regmean(c.base, c.experts, c.inputs)),
}


def _mean(case: Case) -> State:
    merged = seme.merge_state_dicts(list(case.experts), "linear", parameters={"weight": 1.0})
    return {k: v.double() - case.base[k].double() for k, v in merged.items()}


def _plain(case: Case, sigma: float) -> State:
    return case.api("seme", flatten=0.0, sigma=sigma)


def _project(case: Case, kind: str) -> State:
    return controls.project(case.base, case.experts, controls.frame(case.base, kind), sigma=1.0)


def _elect(case: Case, kind: str) -> State:
    return controls.elect(case.base, case.experts, controls.frame(case.base, kind))


def _drift(case: Case, peer: str) -> State:
    """A peer with the embedding merged as ``seme`` merges it."""
    rows = controls.drift(controls.embedding(case.base, case.experts))
    return METHODS[peer].delta(case) | {controls.EMBEDDING: rows}


def _averaged(case: Case) -> State:
    """Rule ``project`` with the embedding merged as most peers merge it."""
    rows = controls.embedding(case.base, case.experts).mean(0)
    return case.api("seme") | {controls.EMBEDDING: rows}


def add(
    base: Mapping[str, torch.Tensor], delta: Mapping[str, torch.Tensor], scale: float, fixed: Iterable[str] = ()
) -> State:
    """``base + scale * delta`` in float64, rounded to float32; tensors named in ``fixed`` are not scaled."""
    return {k: (b.double() + (1.0 if k in fixed else scale) * delta[k].double()).float() for k, b in base.items()}


def gains(merged: Mapping[str, float], base: Mapping[str, float], own: Mapping[str, float]) -> dict[str, float]:
    """Retained gain of each expert's domain: (base - merged) / (base - expert), in losses."""
    return {d: (base[d] - merged[d]) / (base[d] - own[d]) for d in own}


class Unit:
    """One size and seed: its corpus, models, and measurements, all kept and made once."""

    def __init__(self, trained: Trained, corpus: Corpus, results: Shared, say: Callable[[str], None]) -> None:
        self.trained = trained
        self.corpus = corpus
        self.results = results
        self.say = say

    @property
    def name(self) -> str:
        """Size and seed, as in the keys of results."""
        return f"{self.trained.size}/{self.trained.seed}"

    def measure(self, key: str, domains: Iterable[str], state: Callable[[], State]) -> dict[str, float]:
        """The losses kept under a key; measured if there are none."""
        key = f"{self.name}/{key}"
        kept = self.results.get(key)
        if kept is None:
            weights = state()
            found = {d: round(loss(self.trained.model, weights, self.corpus.valid[d]), 7) for d in domains}
            kept = {"loss": found}
            self.results.put(key, kept)
        return dict(kept["loss"])

    def train(self, drifts: Iterable[str]) -> None:
        """Train what is not there yet."""
        for drift in drifts:
            for domain in DOMAINS:
                self.trained.expert(drift, domain)

    def run(self, drifts: Iterable[str], counts: Iterable[int], methods: Iterable[str]) -> None:
        """Measure base, experts and merges."""
        self.measure("base", (BASE, *DOMAINS), lambda: self.trained.base)
        for drift in drifts:
            for domain in DOMAINS:
                self._expert(drift, domain)
            for count in counts:
                case = self.case(drift, DOMAINS[:count])
                for name in methods:
                    self._merge(drift, DOMAINS[:count], case, name)

    def _expert(self, drift: str, domain: str) -> None:
        task = self.trained.expert(drift, domain)
        self.measure(f"{drift}/expert {domain}", (BASE, *DOMAINS), lambda: task)
        delta = {k: task[k] - b for k, b in self.trained.base.items()}
        for scale in EXTRAPOLATION:
            merged = partial(add, self.trained.base, delta, scale)
            self.measure(f"{drift}/expert {domain}/lambda={scale}", (domain,), merged)

    def _merge(self, drift: str, domains: Sequence[str], case: Case, name: str) -> None:
        method = METHODS[name]
        base = self.measure("base", domains, dict)
        own = {d: self.measure(f"{drift}/expert {d}", domains, dict)[d] for d in domains}
        delta = cache(partial(method.delta, case))

        def gain(scale: float) -> float:
            key = f"{drift}/{len(domains)}/{name}/lambda={scale:.1f}"
            found = self.measure(key, (BASE, *domains), lambda: add(case.base, delta(), scale, method.fixed))
            return statistics.mean(gains(found, base, own).values())

        default = gain(method.default)
        best = climb(gain, method.default) if method.tuned else method.default
        where = f"{self.name} {drift} {len(domains)} experts"
        self.say(f"{where}, {name}: {default:.4f}, at lambda {best:.1f} {gain(best):.4f}")

    def case(self, drift: str, domains: Sequence[str]) -> Case:
        """The experts of these domains and what is needed to merge them."""
        t = self.trained
        draws = [batches(self.corpus.train[d], t.settings, 77) for d in domains]
        return Case(t.model, t.base, [t.expert(drift, d) for d in domains], draws)


def climb(value: Callable[[float], float], start: float) -> float:
    """The best scale on the grid of STEP, from ``start`` uphill: in double steps, then in single ones.

    Mean gain is a single hump in the scale, so this is the best of the whole grid for a fraction of its cost.
    """
    best = start
    for step in (2 * STEP, STEP):
        for direction in (1, -1):
            while best + direction * step > STEP / 2 and value(round(best + direction * step, 1)) > value(best):
                best = round(best + direction * step, 1)
    return best
