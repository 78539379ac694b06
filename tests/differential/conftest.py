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

from .compare import Distance
from .families import make
from .oracle import Oracle, OracleMissing

LEDGER = pytest.StashKey[list[dict[str, Any]]]()
ABOUT = pytest.StashKey[list[dict[str, Any]]]()


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[tuple[Oracle, Oracle]]:
    """mergekit on torch's plain kernels, which are the same on every x86-64, and as it runs by default.

    Tests that need it are skipped where mergekit cannot be used.
    """
    folder = tmp_path_factory.mktemp("oracle")
    running: list[Oracle] = []
    try:
        running.append(Oracle(folder / "plain.txt", ATEN_CPU_CAPABILITY="default"))
        running.append(Oracle(folder / "default.txt"))
        pytestconfig.stash[ABOUT] = [o.about for o in running]
        yield running[0], running[1]
    except OracleMissing as e:
        pytest.skip(f"no oracle: {e}")
    finally:
        for process in running:
            process.close()


@pytest.fixture
def oracle(oracles: tuple[Oracle, Oracle]) -> Oracle:
    """mergekit on torch's plain kernels: no fused multiply-adds."""
    return oracles[0]


@pytest.fixture
def default_oracle(oracles: tuple[Oracle, Oracle]) -> Oracle:
    """mergekit as it runs by default, on the best kernels torch has for this machine."""
    return oracles[1]


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
