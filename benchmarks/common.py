"""What all benchmarks share: where numbers come from, medians, and the JSON they are kept in.

A results file is ``{"about": {field: meaning}, "runs": {id: provenance}, "entries": {key: entry}}``. Each entry names
the run it was measured in, so a file can be built up over several runs. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

GIB = 1 << 30
MIB = 1 << 20


def summarize(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles (inclusive method), smallest value and number of samples."""
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {"median": median, "q1": q1, "q3": q3, "min": min(samples), "samples": len(samples)}


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """All calls in turns, after one round that does not count: statistics and samples."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):
        for name, call in calls.items():
            took = seconds(call)
            if number >= 0:
                samples[name].append(round(took, 6))
    return {name: summarize(times) for name, times in samples.items()}, samples


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, RAM, kernel, one-minute load."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(re.findall(r"^(model name|cpu family|model|flags)\s*:\s*(.*)$", info, re.MULTILINE))
    memory = Path("/proc/meminfo").read_text()
    total = int(re.search(r"^MemTotal:\s*(\d+)", memory, re.MULTILINE)[1]) * 1024  # type: ignore[index]
    return {
        "cpu": f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})",
        "avx512": "avx512f" in fields["flags"].split(),
        "virtual": "hypervisor" in fields["flags"].split(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(total / GIB, 1),
        "kernel": platform.release(),
        "load": os.getloadavg()[0],
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that are measured; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "mergekit", "transformers", "safetensors", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> dict[str, Any]:
    """Git commit of this tree and whether files differ from it (results and documents aside)."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":!benchmarks", ":!docs", ":!*.md")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def provenance() -> dict[str, Any]:
    """Date (UTC), commit, machine and versions: what a number is worth nothing without."""
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"date": date, **commit(), "machine": machine(), "versions": versions()}


class Results:
    """A results file that is rewritten, whole and atomically, whenever an entry is put in."""

    def __init__(self, path: Path, run: dict[str, Any], about: dict[str, str]) -> None:
        self.path = path
        self.run = run
        old = load(path) if path.exists() else {"runs": {}, "entries": {}}
        self.data: dict[str, Any] = {"about": about, "runs": old["runs"], "entries": old["entries"]}

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry kept under this key, or None."""
        entry: dict[str, Any] | None = self.data["entries"].get(key)
        return entry

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Replace the entry; runs that no entry names any more are dropped."""
        date = self.run["date"]
        self.data["runs"][date] = self.run
        self.data["entries"][key] = {"run": date, **entry}
        used = {e["run"] for e in self.data["entries"].values()}
        self.data["runs"] = {k: v for k, v in self.data["runs"].items() if k in used}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.replace(self.path)


def load(path: Path) -> dict[str, Any]:
    """A results file as written by :class:`Results`."""
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads as plain text; all columns but the first are right-aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
