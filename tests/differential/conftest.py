"""Fixtures of the comparison with mergekit; the table at its end is in :mod:`.summary`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from .compare import Distance
from .families import make
from .oracle import Oracle, OracleMissing
from .summary import ABOUT, LEDGER


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
