"""seme/sources.py: tensors that are made while they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seme import dtypes
from seme.checkpoint import Checkpoint
from seme.sources import BLOCK_ROWS, MEAN, PADDING, ZERO, Gathered, LowRank, Rows, Source, StoredTensor

from .checkpoints import write

Make = Callable[[torch.Tensor], Source]


@pytest.fixture
def stored(tmp_path: Path) -> Make:
    """A tensor in a checkpoint of its own."""

    def make(tensor: torch.Tensor) -> Source:
        folder = write(tmp_path / str(len(list(tmp_path.iterdir()))), {"w": tensor}, None)
        checkpoint = Checkpoint(folder)
        return StoredTensor(checkpoint, checkpoint.tensors["w"])

    return make


def read(source: Source, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Elements [start, stop), flat."""
    size, dtype = source.dtype.itemsize, source.dtype.to_torch()
    out = bytearray(((source.numel if stop is None else stop) - start) * size)
    source.read_into(start * size, memoryview(out))
    return torch.frombuffer(out, dtype=dtype) if out else torch.empty(0, dtype=dtype)


def pieces_agree(source: Source) -> None:
    """The same bytes however they are asked for."""
    whole = read(source)
    for step in (1, 3, 7, 64, 1000):
        parts = [read(source, at, min(at + step, source.numel)) for at in range(0, source.numel, step)]
        assert torch.equal(torch.cat(parts), whole)


class TestStored:
    def test_is_what_lies_there(self, stored: Make) -> None:
        tensor = torch.randn(5, 3).bfloat16()
        source = stored(tensor)
        assert (source.name, source.shape, source.numel, source.nbytes) == ("w", (5, 3), 15, 30)
        assert torch.equal(read(source).view(5, 3), tensor)
        assert not source.needs_torch


class TestGathered:
    def test_rows_come_in_the_order_asked_for(self, stored: Make) -> None:
        a, b = torch.randn(6, 3), torch.randn(4, 3)
        sources = [stored(a), stored(b)]
        rows = Rows([0, 2, 3, 4, 6, 7], [0, 1, 0, 1, ZERO], [4, 3, 0, 1, 0])
        gathered = Gathered(sources[0], sources, rows, dtypes.float32)
        assert gathered.shape == (7, 3)
        assert torch.equal(read(gathered).view(7, 3), torch.cat([a[4:6], b[3:], a[:1], b[1:3], torch.zeros(1, 3)]))
        assert not gathered.needs_torch
        pieces_agree(gathered)

    def test_a_run_of_rows_is_one_read(self, stored: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        source = stored(torch.randn(100, 3))
        sizes: list[int] = []
        monkeypatch.setattr(StoredTensor, "read_runs", lambda *given: sizes.extend(given[3].tolist()))
        read(Gathered(source, [source], Rows([0, 60, 100], [0, 0], [40, 0]), dtypes.float32))
        assert sizes == [60 * 12, 40 * 12]

    @pytest.mark.parametrize("out", ["bfloat16", "float32"])
    def test_means_are_taken_in_its_dtype_in_the_order_of_the_models(self, out: str, stored: Make) -> None:
        dtype = dtypes.BY_NAME[out]
        tensors = [torch.randn(4, 5, dtype=t) for t in (torch.bfloat16, torch.float32, torch.bfloat16)]
        sources = [stored(t) for t in tensors]
        rows = Rows([0, 1, 2], [0, MEAN], [2, 0], {1: [(0, 1), (1, 3), (2, 0)]})
        gathered = Gathered(sources[0], sources, rows, dtype)
        held = [t.to(dtype.to_torch()) for t in tensors]
        expected = torch.stack([held[0][2], (held[0][1] + held[1][3] + held[2][0]) / 3])
        assert torch.equal(read(gathered).view(2, 5), expected)
        assert gathered.needs_torch
        pieces_agree(gathered)

    def test_padding_is_the_mean_of_the_rows_before_it(self, stored: Make) -> None:
        tensor = torch.randn(6, 5)
        source = stored(tensor)
        gathered = Gathered(source, [source], Rows([0, 4, 7], [0, PADDING], [1, 0]), dtypes.float32)
        found = read(gathered).view(7, 5)
        assert torch.equal(found[:4], tensor[1:5])
        # Added in float64 and rounded once.
        assert torch.equal(found[4:], tensor[1:5].double().mean(0).float().expand(3, 5))
        pieces_agree(gathered)

    def test_vectors_and_tables_of_one_row(self, stored: Make) -> None:
        for tensor in (torch.arange(5.0), torch.arange(5.0).view(1, 5)):
            source = stored(tensor)
            gathered = Gathered(source, [source], Rows([0, 2, 3], [0, 0], [3, 0]), dtypes.float32)
            assert gathered.shape == ((3,) if tensor.dim() == 1 else (1, 3))
            assert read(gathered).tolist() == [3, 4, 0]

    def test_another_dtype_is_converted(self, stored: Make) -> None:
        tensor = torch.randn(3, 4).bfloat16()
        gathered = Gathered(stored(tensor), [stored(tensor)], Rows([0, 3], [0], [0]), dtypes.float32)
        assert torch.equal(read(gathered).view(3, 4), tensor.float())
        assert gathered.needs_torch
        pieces_agree(gathered)


class TestLowRank:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("rows", [1, BLOCK_ROWS - 1, BLOCK_ROWS, 3 * BLOCK_ROWS + 5])
    def test_is_the_matrix_plus_the_product(self, dtype: torch.dtype, rows: int, stored: Make) -> None:
        tensor = torch.randn(rows, 37).to(dtype)
        left, right = torch.randn(rows, 4), torch.randn(4, 37)
        source = LowRank(stored(tensor), lambda: (left, right), 0.5)
        exact = tensor.double() + 0.5 * left.double() @ right.double()
        # Five float32 roundings of terms of about the size of the product, and one of the result to its dtype.
        size = tensor.double().abs() + 0.5 * left.double().abs() @ right.double().abs()
        bound = 5 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps / 2 * exact.abs()
        found = read(source).view(rows, 37)
        assert found.dtype == dtype
        assert bool(((found.double() - exact).abs() <= bound).all())
        pieces_agree(source)

    def test_nothing_is_nothing(self, stored: Make) -> None:
        source = LowRank(stored(torch.randn(2, 2)), lambda: (torch.ones(2, 1), torch.ones(1, 2)), 1.0)
        source.read_into(8, memoryview(bytearray()))
