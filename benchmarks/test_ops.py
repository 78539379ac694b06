"""The cases of ``benchmarks.ops`` under pytest-benchmark, seme beside plain torch, grouped by case.

Not part of the test run: ``python -m pytest benchmarks/test_ops.py``. SEME_BENCHMARK_ELEMENTS sets the size.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import ops
from benchmarks.common import seconds

ELEMENTS = int(os.environ.get("SEME_BENCHMARK_ELEMENTS", ops.ELEMENTS))
THREADS = 2
ROUNDS = 7


@pytest.fixture(scope="module")
def tensors() -> ops.Tensors:
    """A base and three fine-tunes."""
    torch.set_num_threads(THREADS)
    return ops.make_tensors(ELEMENTS)


@pytest.fixture(scope="module")
def copy_gb_per_s(tensors: ops.Tensors) -> float:
    """Bandwidth of torch's copy_ on this machine, bytes read plus bytes written."""
    target = torch.zeros_like(tensors[0])
    times = [seconds(lambda: target.copy_(tensors[0])) for _ in range(ROUNDS + 1)]
    return 4 * ELEMENTS / statistics.median(times[1:]) / 1e9


@pytest.mark.parametrize("provider", ["seme", "torch"])
@pytest.mark.parametrize("name", list(ops.cases(0)))
def test_op(benchmark: BenchmarkFixture, tensors: ops.Tensors, copy_gb_per_s: float, name: str, provider: str) -> None:
    """Times one case; ``extra_info`` holds GB/s and its ratio to the copy bandwidth."""
    case = ops.cases(ops.threshold(tensors))[name]
    inputs = tensors[: case.inputs]
    ops.verify(case, inputs)
    call: Callable[[], object] = ops.runner(case, inputs, THREADS) if provider == "seme" else lambda: case.torch(inputs)
    benchmark.group = name
    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
    speed = case.bytes(ELEMENTS) / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["gb_per_s"] = speed
    benchmark.extra_info["copy_gb_per_s"] = copy_gb_per_s
    benchmark.extra_info["of_copy"] = speed / copy_gb_per_s
