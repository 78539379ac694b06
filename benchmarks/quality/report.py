"""Tables of ``docs/quality.md`` and its picture, from the results file."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, load, table
from benchmarks.quality.corpus import BASE, DOMAINS
from benchmarks.quality.grid import EXTRAPOLATION, METHODS, gains

DOCUMENT = ROOT / "docs" / "quality.md"
IMAGE = ROOT / "docs" / "images" / "quality.svg"
TUNED = (0, 1, 2)
"""Seeds that the defaults were chosen on; the others were measured afterwards and are reported on their own."""
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Regime:
    """One panel: size, drift, number of experts."""

    size: str
    drift: str
    count: int

    def __str__(self) -> str:
        return f"{self.size}, {self.drift}, {self.count} experts"


@dataclass(frozen=True)
class Point:
    """One merge of one seed: scale, retained gain (mean and worst domain), forgetting in nats."""

    scale: float
    mean: float
    worst: float
    forgetting: float


@dataclass(frozen=True)
class Row:
    """One method in one regime: by seed, its default and the best of its scales."""

    default: dict[int, Point]
    best: dict[int, Point]


class Grid:
    """The results of some seeds, by regime and method."""

    def __init__(self, data: dict[str, Any], seeds: Callable[[int], bool] = lambda seed: True) -> None:
        found = {k: e["loss"] for k, e in data["entries"].items()}
        self.losses: dict[str, dict[str, float]] = {k: x for k, x in found.items() if seeds(int(k.split("/")[1]))}
        keys = [k.split("/") for k in self.losses]
        self.sizes = _unique(k[0] for k in keys)
        self.seeds = sorted({int(k[1]) for k in keys})
        drifts = _unique(k[2] for k in keys if len(k) > 3)
        counts = sorted({int(k[3]) for k in keys if len(k) == 6 and k[3].isdigit()}, reverse=True)
        counts = counts or sorted({int(k[3]) for k in keys if len(k) > 4 and k[3].isdigit()}, reverse=True)
        self.regimes = [Regime(s, d, c) for s in self.sizes for d in drifts for c in counts]

    def row(self, regime: Regime, method: str) -> Row:
        """What was measured of a method, by seed."""
        default: dict[int, Point] = {}
        best: dict[int, Point] = {}
        for seed in self.seeds:
            points = self._points(regime, method, seed)
            usual = [p for p in points if p.scale == METHODS[method].default]
            if usual:
                default[seed] = usual[0]
                best[seed] = max(points, key=lambda p: p.mean)
        return Row(default, best)

    def _points(self, regime: Regime, method: str, seed: int) -> list[Point]:
        unit = f"{regime.size}/{seed}"
        domains = DOMAINS[: regime.count]
        prefix = f"{unit}/{regime.drift}/{regime.count}/{method}/lambda="
        found = {k: v for k, v in self.losses.items() if k.startswith(prefix)}
        if not found:
            return []
        base = self.losses[f"{unit}/base"]
        own = {d: self.losses[f"{unit}/{regime.drift}/expert {d}"][d] for d in domains}
        points = []
        for key, losses in found.items():
            gain = gains(losses, base, own)
            scale = float(key[len(prefix) :])
            forgetting = losses[BASE] - base[BASE]
            points.append(Point(scale, statistics.mean(gain.values()), min(gain.values()), forgetting))
        return points


def _unique(values: Iterator[str]) -> list[str]:
    return sorted(set(values))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % confidence interval (Student's t); nan for a single value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, float("nan")
    return mean, STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5


def _number(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:.3f}" if half != half else f"{mean:.3f} ± {half:.3f}"


def regime_table(grid: Grid, regime: Regime) -> str:
    """Every method of one regime."""
    rows = []
    for name, method in METHODS.items():
        row = grid.row(regime, name)
        if not row.best:
            continue
        default, best = list(row.default.values()), list(row.best.values())
        scale = statistics.median(p.scale for p in best)
        rows.append(
            [
                f"**{name}**" if method.kind == "seme" else name,
                f"{method.default:g}",
                _number([p.mean for p in default]),
                f"{statistics.mean(p.worst for p in default):.3f}",
                f"{statistics.mean(p.forgetting for p in default):+.3f}",
                f"{scale:.1f}" if method.tuned else "-",
                _number([p.mean for p in best]) if method.tuned else "-",
                f"{statistics.mean(p.worst for p in best):.3f}" if method.tuned else "-",
                f"{statistics.mean(p.forgetting for p in best):+.3f}" if method.tuned else "-",
            ]
        )
    header = ["method", "lambda", "gain", "worst", "forgets", "best lambda", "gain", "worst", "forgets"]
    return table(header, rows)


PEERS = tuple(n for n, m in METHODS.items() if m.kind == "peer")
DRIFTING = tuple(n for n in METHODS if n.endswith(", drift embeddings"))


def best_of(grid: Grid, regime: Regime, names: Sequence[str] = PEERS) -> tuple[str, Row]:
    """The method with the highest mean gain at its best scales."""
    rows = {n: grid.row(regime, n) for n in names}
    rows = {n: r for n, r in rows.items() if r.best}
    name = max(rows, key=lambda n: statistics.mean(p.mean for p in rows[n].best.values()))
    return name, rows[name]


def paired_table(grid: Grid, regimes: Sequence[Regime]) -> str:
    """``seme`` at its defaults minus the best peer at its best scale, seed by seed; and the ceiling."""
    rows = []
    for regime in regimes:
        name, peer = best_of(grid, regime)
        ceiling = grid.row(regime, "RegMean with data")
        line = [str(regime), name, _number([p.mean for p in peer.best.values()])]
        for method in (n for n, m in METHODS.items() if m.kind == "seme"):
            own = grid.row(regime, method).default
            both = [s for s in own if s in peer.best]
            line.append(_signed([own[s].mean - peer.best[s].mean for s in both]) if both else "-")
        line.append(_number([p.mean for p in ceiling.default.values()]) if ceiling.default else "-")
        line.append(_number([p.mean for p in ceiling.best.values()]) if ceiling.best else "-")
        rows.append(line)
    ours = [f"{n} minus it" for n, m in METHODS.items() if m.kind == "seme"]
    return table(["regime", "best peer", "gain", *ours, "RegMean, lambda 1", "at its best"], rows)


def embedding_table(grid: Grid, regimes: Sequence[Regime]) -> str:
    """What is left of the lead with the same rule for embeddings on both sides; peers at their best scales."""

    def lead(regime: Regime, method: str, peer: Row) -> str:
        own = grid.row(regime, method).default
        both = [own[s].mean - peer.best[s].mean for s in own if s in peer.best]
        return _signed(both) if both else "-"

    rows = []
    for regime in regimes:
        if not any(grid.row(regime, n).best for n in DRIFTING):
            continue
        drifting, with_drift = best_of(grid, regime, DRIFTING)
        plain, peer = best_of(grid, regime)
        rows.append(
            [
                str(regime),
                drifting,
                _number([p.mean for p in with_drift.best.values()]),
                lead(regime, "SeMe project", with_drift),
                plain,
                lead(regime, "project, mean embeddings", peer),
            ]
        )
    header = ["regime", "best peer with drift embeddings", "gain", "SeMe project minus it"]
    return table([*header, "best plain peer", "project, mean embeddings minus it"], rows)


def _signed(values: Sequence[float]) -> str:
    mean, half = interval(values)
    return f"{mean:+.3f}" if half != half else f"{mean:+.3f} ± {half:.3f}"


CONTROLS = (
    ("SeMe elect", "elect, random vectors"),
    ("SeMe elect", "elect, LM-head rows"),
    ("SeMe elect", "elect, raw coordinates"),
    ("the same, sigma 0.5", "project, not flattened"),
    ("the same, sigma 1", "project, not flattened"),
    ("the same, sigma 1", "sigma 1, random vectors"),
    ("the same, sigma 1", "sigma 1, LM-head rows"),
    ("the same, sigma 1", "sigma 1, embeddings"),
    ("project, latent axis", "SeMe project"),
    ("SeMe project", "project, not flattened"),
    ("SeMe project", "project, mean embeddings"),
    ("SeMe sequence", "SeMe project"),
)
"""Pairs of methods whose difference says what one ingredient is worth."""


def control_table(grid: Grid, regimes: Sequence[Regime]) -> str:
    """The first of each pair minus the second, at their defaults, seed by seed."""
    rows = []
    for first, second in CONTROLS:
        line = [f"{first.replace('the same', 'not flattened')} minus {second}"]
        for regime in regimes:
            one, other = grid.row(regime, first).default, grid.row(regime, second).default
            both = [one[s].mean - other[s].mean for s in one if s in other]
            line.append(_signed(both) if both else "-")
        rows.append(line)
    return table(["difference of gains", *(f"{r.size} {r.drift} {r.count}" for r in regimes)], rows)


def summary_table(grid: Grid, regimes: Sequence[Regime]) -> str:
    """Mean gain at the best scale, all regimes beside each other; the method ``seme`` at its default."""
    rows = []
    for name, method in METHODS.items():
        if method.kind == "control":
            continue
        line = [f"**{name}**, default" if method.kind == "seme" else f"{name}, best lambda" if method.tuned else name]
        for regime in regimes:
            row = grid.row(regime, name)
            points = row.default if method.kind == "seme" else row.best
            line.append(f"{statistics.mean(p.mean for p in points.values()):.3f}" if points else "-")
        rows.append(line)
    return table(["method", *(f"{r.size} {r.drift} {r.count}" for r in regimes)], rows)


def model_table(grid: Grid) -> str:
    """Losses of base and experts on each domain, and the extrapolation check, over seeds."""
    rows = []
    for size, drift in sorted({(r.size, r.drift) for r in grid.regimes}, key=lambda x: (x[0], x[1])):
        for domain in DOMAINS:
            curves = []
            for seed in grid.seeds:
                key = f"{size}/{seed}/{drift}/expert {domain}"
                if f"{key}/lambda={EXTRAPOLATION[-1]}" in grid.losses:
                    losses = [grid.losses[f"{key}/lambda={x}"][domain] for x in EXTRAPOLATION]
                    curves.append((grid.losses[f"{size}/{seed}/base"][domain], grid.losses[key][domain], losses))
            if curves:
                mean = [statistics.mean(c[2][i] for c in curves) for i in range(len(EXTRAPOLATION))]
                excess = [f"{x - min(mean):.4f}" for x in mean]
                base, own = (statistics.mean(c[i] for c in curves) for i in (0, 1))
                best = EXTRAPOLATION[mean.index(min(mean))]
                rows.append([f"{size} {drift} {domain}", f"{base:.3f}", f"{own:.3f}", *excess, f"{best:g}"])
    return table(["expert", "base", "expert", *(f"{x:g}" for x in EXTRAPOLATION), "minimum at"], rows)


def measured(grid: Grid) -> list[Regime]:
    """The regimes that there are results of."""
    return [r for r in grid.regimes if grid.row(r, "task arithmetic").best]


def tables(grid: Grid, untouched: Grid) -> dict[str, str]:
    """Every table of the page, by the name of its marker."""
    regimes = measured(grid)
    details = "\n\n".join(f"### {r}\n\n{regime_table(grid, r)}" for r in regimes)
    return {
        "quality-summary": summary_table(grid, regimes),
        "quality-paired": paired_table(grid, regimes),
        "quality-untouched": paired_table(untouched, measured(untouched)),
        "quality-embeddings": embedding_table(grid, regimes),
        "quality-controls": control_table(grid, regimes),
        "quality-models": model_table(grid),
        "quality-details": details,
    }


def write(results: Path, document: Path = DOCUMENT, image: Path = IMAGE) -> None:
    """Fill the tables of the page between their markers, and draw the picture."""
    data = load(results)
    grid = Grid(data, lambda seed: seed in TUNED)
    text = document.read_text()
    for name, body in tables(grid, Grid(data, lambda seed: seed not in TUNED)).items():
        pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    document.write_text(text)
    draw(grid, image)


def draw(grid: Grid, image: Path) -> None:
    """Retained gain of each method, a panel for each regime: default (hollow), best lambda (solid), RegMean (line)."""
    import matplotlib.pyplot as plt

    plt.switch_backend("svg")
    ink, faint = "#1f2328", "#656d76"
    colors = {"peer": "#8c959f", "seme": "#1f6feb"}
    plt.rcParams.update({"font.family": "sans-serif", "font.size": 8, "text.color": ink, "svg.hashsalt": "seme"})
    names = [n for n, m in METHODS.items() if m.kind in colors]
    regimes = measured(grid)
    columns = 4 if len(regimes) > 2 else len(regimes)
    lines = -(-len(regimes) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.4 * columns + 1, (0.21 * len(names) + 0.7) * lines), sharey=True, squeeze=False,
        layout="constrained", facecolor="white",
    )  # fmt: skip
    for axis, regime in zip(axes.flat, regimes):
        for place, name in enumerate(names):
            row = grid.row(regime, name)
            color = colors[METHODS[name].kind]
            for points, filled in ((row.default, False), (row.best, True)):
                if points:
                    mean, half = interval([p.mean for p in points.values()])
                    axis.errorbar(
                        mean, place, xerr=None if half != half else half, fmt="o", markersize=4, color=color,
                        markerfacecolor=color if filled else "white", elinewidth=1,
                    )  # fmt: skip
        ceiling = grid.row(regime, "RegMean with data")
        for points, style in ((ceiling.default, ":"), (ceiling.best, "--")):
            if points:
                axis.axvline(statistics.mean(p.mean for p in points.values()), color=ink, linewidth=1, linestyle=style)
        axis.set_title(str(regime), loc="left", fontsize=8)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        top = max(p.mean for n in names for p in grid.row(regime, n).best.values())
        axis.set_xlim(left=top - 0.35)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", color="#eaeef2")
        axis.spines[["top", "right", "left"]].set_visible(False)
    for axis in list(axes.flat)[len(regimes) :]:
        axis.set_visible(False)
    figure.supxlabel(
        "retained gain, mean over domains and seeds, 95 % confidence; hollow: default, solid: best lambda; lines: "
        "RegMean with real inputs, lambda 1 (dotted) and best (dashed)", fontsize=7, color=faint,
    )  # fmt: skip
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, metadata={"Date": None})
    plt.close(figure)
