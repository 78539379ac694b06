"""Writes the tables of the kept results, and those of ``benchmarks/paper.py``, into README.md and docs/.

A table stands between ``<!-- table NAME -->`` and ``<!-- end NAME -->``, NAME being a key of :data:`TABLES` or of
``paper.TABLES``; what lies between is replaced. ``--check`` changes nothing and fails if a table is not up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import bases, matrix, merge, ops, paper, planning, scale, validation
from benchmarks.checkpoints import SIZES
from benchmarks.common import MIB, RESULTS, ROOT, load, table
from benchmarks.plot import where

DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("benchmarks.md", "semantics.md", "gpu.md")))


SHORT = (
    "linear",
    "slerp",
    "task_arithmetic",
    "ties",
    "breadcrumbs",
    "dare_ties",
    "della",
    "sce",
    "model_stock",
    "karcher",
)
"""The methods of the table in the README."""


def complete(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of whole merges that are complete, by size and method."""
    entries = data["entries"]
    keys = [f"{size}/{method}" for size in SIZES for method in merge.METHODS]
    return [entries[key] for key in keys if key in entries and entries[key]["complete"]]


def merge_table(data: dict[str, Any]) -> str:
    """Whole merges, all columns."""
    return merge.report(complete(data))


def short_merge_table(data: dict[str, Any]) -> str:
    """Some whole merges that both engines ran: seconds until the output is on disk, and memory."""
    rows = []
    for entry in complete(data):
        if entry["method"] in SHORT and {"seme", "mergekit"} <= entry["summary"].keys():
            sides = [entry["summary"][engine] for engine in ("seme", "mergekit")]
            row = [f"{entry['size']} {entry['method']}", f"{entry['summary']['floor']['durable_s']['median']:.1f} s"]
            row += [f"{side['durable_s']['median']:.1f} s" for side in sides]
            row.append(f"{entry['ratios']['mergekit_over_seme_durable']:.1f}x")
            row += [f"{side['peak_anonymous_bytes']['median'] / MIB:.0f} MiB" for side in sides]
            rows.append(row)
    return table(["model, method", "I/O alone", "seme", "mergekit", "faster", "memory seme", "memory mergekit"], rows)


def ops_table(data: dict[str, Any]) -> str:
    """The ops, in the order of the file."""
    return ops.report(data["entries"])


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "merge-cpu": ("merge-cpu.json", merge_table),
    "merge-cpu-short": ("merge-cpu.json", short_merge_table),
    "ops-cpu": ("ops-cpu.json", ops_table),
    "matrix-cpu": ("matrix-cpu.json", lambda data: matrix.report(data["entries"])),
    "matrix-cpu-whole": ("matrix-cpu.json", lambda data: matrix.report_whole(data["entries"])),
    "planning-cpu": ("planning-cpu.json", lambda data: planning.report(data["entries"], "plan")),
    "alignment-cpu": ("planning-cpu.json", lambda data: planning.report(data["entries"], "align")),
    "gather-cpu": ("planning-cpu.json", lambda data: planning.report_gather(data["entries"])),
    "scale": ("scale.json", lambda data: scale.report(data["entries"])),
    "bases-cpu": ("bases-cpu.json", lambda data: bases.report(data["entries"])),
    "validation": ("validation.json", lambda data: validation.report(data["entries"])),
    "validation-frames": ("validation.json", lambda data: validation.report_frames(data["entries"])),
}


def machines(data: dict[str, Any]) -> str:
    """One line for each run of a results file: machine, date, commit, versions, disk."""
    lines = []
    for run in data["runs"].values():
        parts = [where(run), f"commit {(run['commit'] or 'unknown')[:10]}{' with changes' if run['dirty'] else ''}"]
        parts += [f"{p} {run['versions'][p]}" for p in ("torch", "mergekit") if run["versions"].get(p)]
        disk = run["machine"].get("disk")
        if disk:
            speed = f"{disk['write_mb_s']} MB/s written with fsync, {disk['read_mb_s']} MB/s read"
            parts.append(f"{disk['filesystem']}, {speed}")
        lines.append("; ".join(parts) + ".")
    return "\n".join(lines)


def fill(text: str, results: Path) -> str:
    """The text with every table replaced that it has room for, if its results file exists."""

    def place(name: str) -> re.Pattern[str]:
        return re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)

    bodies = {}
    for name, (source, make) in TABLES.items():
        if (results / source).exists() and place(name).search(text):
            data = load(results / source)
            bodies[name] = f"{make(data)}\n\n{machines(data)}\n"
    for name, write in paper.TABLES.items():
        if place(name).search(text):
            bodies[name] = f"{write(results)}\n"
    for name, body in bodies.items():
        text = place(name).sub(lambda match, body=body: f"{match[1]}{body}{match[2]}", text)
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="write the tables of the results")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    parser.add_argument("documents", nargs="*", type=Path, default=DOCUMENTS)
    arguments = parser.parse_args()
    stale = False
    for document in arguments.documents:
        if not document.exists():
            continue
        old = document.read_text()
        new = fill(old, arguments.results)
        if new != old:
            stale = True
            print(f"{document.name}: {'out of date' if arguments.check else 'rewritten'}")
            if not arguments.check:
                document.write_text(new)
    sys.exit(1 if arguments.check and stale else 0)


if __name__ == "__main__":
    main()
