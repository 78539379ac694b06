"""Fixtures of the comparison with mergekit, and the table at its end.

``SEME_DIFFERENTIAL_REPORT=FILE`` writes what was compared as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from .checkpoints import make
from .compare import Distance
from .oracle import Oracle, OracleMissing

LEDGER = pytest.StashKey[list[dict[str, Any]]]()
ABOUT = pytest.StashKey[dict[str, Any]]()


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Oracle]:
    """The mergekit process; tests that need it are skipped where mergekit cannot be used."""
    try:
        running = Oracle(tmp_path_factory.mktemp("oracle") / "stderr.txt")
    except OracleMissing as e:
        pytest.skip(f"no oracle: {e}")
    pytestconfig.stash[ABOUT] = running.about
    yield running
    running.close()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """``model(family, member, dtype)``: the folder of a checkpoint, made once per session."""
    root = tmp_path_factory.mktemp("models")

    def find(family: str, member: str, dtype: str) -> Path:
        folder = root / f"{family}-{member}-{dtype}"
        return folder if folder.exists() else make(folder, family, member, dtype)

    return find


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, str, Distance], None]:
    """``record(method, precision, distance)``: put a comparison into the table."""
    ledger = request.config.stash.setdefault(LEDGER, [])

    def add(method: str, precision: str, distance: Distance) -> None:
        ledger.append({"case": request.node.name, "method": method, "precision": precision, **asdict(distance)})

    return add


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    ledger = config.stash.get(LEDGER, [])
    if not ledger:
        return
    about = config.stash.get(ABOUT, {})
    rows: dict[tuple[str, str], tuple[int, Distance]] = {}
    for entry in ledger:
        found = Distance(**{k: v for k, v in entry.items() if k not in ("case", "method", "precision")})
        for key in ((entry["method"], entry["precision"]), ("all", "")):
            cases, total = rows.setdefault(key, (0, Distance()))
            total.add(found)
            rows[key] = (cases + 1, total)
    terminalreporter.section(f"compared with mergekit {about.get('version')}, torch {about.get('torch')}")
    terminalreporter.write_line(
        f"{'method':<16} {'computed, written':<20} {'cases':>5} {'tensors':>7} {'elements':>9} {'differ':>6} "
        f"{'worst ulp':>9} {'of bound':>8} | {'in ties':>8} {'differ':>7}"
    )
    for (method, precision), (cases, d) in sorted(rows.items(), key=lambda row: (row[0][0] == "all", row[0])):
        terminalreporter.write_line(
            f"{method:<16} {precision:<20} {cases:>5} {d.tensors:>7} {d.elements:>9} {d.differing:>6} "
            f"{d.worst:>9.3g} {d.ratio:>8.2g} | {d.ties:>8} {d.differing_ties:>7}"
        )
    target = os.environ.get("SEME_DIFFERENTIAL_REPORT")
    if target:
        total = asdict(rows["all", ""][1])
        report = {"oracle": about, "cases": len(ledger), "total": total, "comparisons": ledger}
        Path(target).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        terminalreporter.write_line(f"written to {target}")
