"""benchmarks/gpu/tune.py, as far as it works without a GPU: candidates, choice, and that it leaves the table alone."""

import copy
import importlib.util
import os

import pytest
import torch
from seme.kernels import tables
from seme.kernels.tables import Flat, Tiles

from benchmarks.gpu import tune
from seme.ops import weighted_sum
from seme.ops._registry import MATRIX_OPS, OPS


def test_the_table_is_among_the_candidates():
    for capability, row in tables.FLAT.items():
        assert row.keys() == OPS.keys()
        for op, shape in row.items():
            assert shape in tune.flat_candidates(op)
        for operand in tune.BYTES:
            assert tables.TILES[capability][operand] in tune.tile_candidates(operand, capability)


def test_a_dry_run_lists_every_op_and_needs_no_gpu(capsys):
    tune.main(["--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(":")[0].split(",")[0] for line in lines} == OPS.keys() | MATRIX_OPS.keys()
    tune.main(["--dry-run", "--ops", "ties", "elect"])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "ties",
        "elect, sm_80, bfloat16",
        "elect, sm_90, bfloat16",
    ]


def test_symmetric_results_take_squares():
    assert not tune.takes("delta_gram", Tiles(128, 64, 32, 8, 3))
    assert tune.takes("delta_gram", Tiles(64, 64, 32, 8, 3))
    assert tune.takes("elect", Tiles(128, 64, 32, 8, 3))


def test_best_is_that_of_all_ops_together():
    own, one, two = Tiles(64, 64, 32, 8, 2), Tiles(128, 128, 32, 8, 2), Tiles(128, 64, 32, 8, 2)
    times = {"a": {own: 4.0, one: 2.0, two: 1.0}, "b": {own: 10.0, one: 8.0}}
    assert tune.best(times) == one  # two is faster, but b cannot be cut up so
    times["b"][one] = 21.0  # 0.5 * 2.1 > 1
    assert tune.best(times) == own


def test_the_bound_for_matrix_results():
    x = torch.linspace(1, 2, 100)
    assert tune.agree((x, torch.tensor([3])), (x * 1.009, torch.tensor([4])), exact=False)
    assert not tune.agree(x, x * 1.011, exact=False)
    assert not tune.agree(x, x * float("nan"), exact=False)
    assert not tune.agree(x, torch.nextafter(x, x + 1), exact=True)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="the interpreter of triton is needed",
)
def test_shapes_reach_the_kernel_and_the_table_stays(monkeypatch):
    before = copy.deepcopy(tables.FLAT)
    row = tables.FLAT[max(tables.FLAT)]  # that of the interpreter
    tensors = [torch.randn(3000) for _ in range(2)]
    used = []
    options = Flat.options
    monkeypatch.setattr(Flat, "options", lambda self: used.append(self) or options(self))

    def call():
        return weighted_sum(tensors, [0.5, 0.25], backend="triton")

    shapes = [Flat(512, 2), Flat(2048, 8)]
    times = tune.try_shapes(call, row, "weighted_sum", shapes, lambda call: float(len(used)), exact=True)
    assert list(times) == [before[max(before)]["weighted_sum"], *shapes]
    assert set(used) == set(times)
    assert before == tables.FLAT
