"""Draws ``docs/images/merge-speed.svg`` from ``benchmarks/results/merge-cpu.json``.

One panel per model size; per method the time of seme and of mergekit as a multiple of the I/O floor, on a
logarithmic scale, with the quartiles. Time runs until the output is on disk, for the floor as for the engines;
``--metric wall`` takes the time until the process ends instead, and the floor without fsync.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.checkpoints import SIZES
from benchmarks.common import RESULTS, ROOT, load
from benchmarks.merge import METHODS

IMAGE = ROOT / "docs" / "images" / "merge-speed.svg"
COLORS = {"seme": "#1f6feb", "mergekit": "#b8bec8"}
INK = "#1f2328"
FAINT = "#656d76"


def where(run: dict[str, Any]) -> str:
    """One line on the machine and date of a run."""
    machine = run["machine"]
    return (
        f"{machine['cpu'].split(' (')[0]}, {machine['cores']} cores, {machine['ram_gib']:.0f} GiB RAM, "
        f"{'virtual machine, ' if machine['virtual'] else ''}{run['date'][:10]}"
    )


def number(value: float) -> str:
    """One digit behind the point below 10, none above."""
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def draw(data: dict[str, Any], image: Path, metric: str = "durable") -> None:
    """Write the picture of a results file; ``metric`` is durable or wall."""
    key = f"{metric}_s"
    entries = [e for e in data["entries"].values() if e["complete"] and "seme" in e["summary"]]
    sizes = [s for s in SIZES if any(e["size"] == s for e in entries)]
    if not sizes:
        raise SystemExit("no complete entry in the results file")
    panels = {s: [e for m in METHODS for e in entries if e["size"] == s and e["method"] == m] for s in sizes}
    plt.switch_backend("svg")
    plt.rcParams.update(
        {
            "font.family": "sans-serif",
            "font.size": 9,
            "text.color": INK,
            "axes.labelcolor": FAINT,
            "xtick.color": FAINT,
            "ytick.color": INK,
            "svg.hashsalt": "seme",
        }
    )
    heights = [len(p) for p in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(7.2, 1.3 + 0.52 * sum(heights) + 0.45 * len(heights)),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
        facecolor="white",
    )
    top = 1.0
    for axis, (size, panel) in zip(axes[:, 0], panels.items(), strict=True):
        for place, entry in enumerate(panel):
            floor = entry["summary"]["floor"][key]["median"]
            for engine, color in COLORS.items():
                if engine not in entry["summary"]:
                    continue
                time = entry["summary"][engine][key]
                ratio = time["median"] / floor
                top = max(top, ratio)
                y = place + (0.2 if engine == "mergekit" else -0.2)
                axis.barh(y, ratio, height=0.38, color=color, label=engine if place == 0 else None)
                axis.hlines(y, time["q1"] / floor, time["q3"] / floor, color=INK, linewidth=1)
                weight = "bold" if engine == "seme" else "normal"
                label = f"{number(ratio)}x  ({number(time['median'])} s)"
                axis.annotate(
                    label, (max(ratio, time["q3"] / floor), y), (5, 0), textcoords="offset points", va="center",
                    fontsize=8, fontweight=weight,
                )  # fmt: skip
        axis.set_yticks(range(len(panel)), [e["method"] for e in panel])
        axis.set_ylim(len(panel) - 0.5, -0.5)
        axis.set_title(f"{SIZES[size].parameters / 1e9:.2f} B parameters, bfloat16", loc="left", fontsize=9)
        axis.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color("#d0d7de")
        axis.set_facecolor("white")
    axes[-1, 0].set_xscale("log")
    axes[-1, 0].set_xlim(0.7, top * 3.2)
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if t <= top * 1.5]
    axes[-1, 0].set_xticks(ticks, [f"{t}x" for t in ticks])
    axes[-1, 0].minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    run = data["runs"][max(e["run"] for e in entries)]
    until = {"durable": "until it is on disk", "wall": "until the process ends"}[metric]
    threads = " and ".join(sorted({str(e["threads"]) for e in entries}))
    figure.supxlabel(
        f"time of a merge {until} / time to read its inputs and write its output (1x), {threads} threads\n{where(run)}",
        fontsize=8,
        color=FAINT,
    )
    image.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"metadata": {"Date": None}} if image.suffix == ".svg" else {"dpi": 130}
    figure.savefig(image, **options)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="draw the kept results")
    parser.add_argument("--results", type=Path, default=RESULTS / "merge-cpu.json")
    parser.add_argument("--image", type=Path, default=IMAGE, help=".svg or .png")
    parser.add_argument("--metric", choices=("durable", "wall"), default="durable")
    arguments = parser.parse_args()
    draw(load(arguments.results), arguments.image, arguments.metric)
    print(arguments.image)


if __name__ == "__main__":
    main()
