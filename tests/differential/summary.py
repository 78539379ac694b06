"""The table at the end of the comparison with mergekit, also when several processes did the comparing.

``SEME_DIFFERENTIAL_REPORT=FILE`` writes what was compared as JSON.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from .compare import Distance

LEDGER = pytest.StashKey[list[dict[str, Any]]]()
ABOUT = pytest.StashKey[list[dict[str, Any]]]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands over what it recorded."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None and LEDGER in session.config.stash:
        output["comparisons"] = session.config.stash[LEDGER]
        output["oracles"] = session.config.stash[ABOUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take what a worker recorded."""
    output = getattr(node, "workeroutput", {})
    if "comparisons" in output:
        node.config.stash.setdefault(LEDGER, []).extend(output["comparisons"])
        node.config.stash[ABOUT] = output["oracles"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    ledger = config.stash.get(LEDGER, [])
    if not ledger:
        return
    about = config.stash[ABOUT]
    rows: dict[tuple[str, str], tuple[int, Distance]] = {}
    for entry in ledger:
        found = Distance(**{k: v for k, v in entry.items() if k not in ("case", "method", "precision")})
        for key in ((entry["method"], entry["precision"]), ("all", "")):
            cases, total = rows.setdefault(key, (0, Distance()))
            total.add(found)
            rows[key] = (cases + 1, total)
    terminalreporter.section("compared with mergekit {version}, torch {torch}".format_map(about[0]))
    terminalreporter.write_line(
        f"{'method':<22} {'computed, written':<20} {'cases':>5} {'tensors':>7} {'elements':>9} {'differ':>8} "
        f"{'worst ulp':>9} {'wrong':>6} | {'in ties':>8} {'differ':>7}"
    )
    for (method, precision), (cases, d) in sorted(rows.items(), key=lambda row: (row[0][0] == "all", row[0])):
        terminalreporter.write_line(
            f"{method:<22} {precision:<20} {cases:>5} {d.tensors:>7} {d.elements:>9} {d.differing:>8} "
            f"{d.worst:>9.3g} {d.outside:>6} | {d.ties:>8} {d.differing_ties:>7}"
        )
    target = os.environ.get("SEME_DIFFERENTIAL_REPORT")
    if target:
        total = asdict(rows["all", ""][1])
        report = {"oracles": about, "cases": len(ledger), "total": total, "comparisons": ledger}
        Path(target).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        terminalreporter.write_line(f"written to {target}")
