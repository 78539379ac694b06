"""Where the elements of an input tensor come from.

Most lie in a checkpoint as the merge reads them. Others are made while they are read, piece by piece and in a memory
that does not depend on the tensor: rows gathered from one or several models, where vocabularies differ
(:class:`Gathered`), and a matrix to which a low-rank product is added, for LoRA adapters (:class:`LowRank`). The
engines know :class:`Source` only.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from seme.checkpoint import Checkpoint, Stored
from seme.dtypes import DType

if TYPE_CHECKING:
    import torch

BLOCK_ROWS = 16
"""Rows of a low-rank product that are computed together, whatever is asked for, so that values do not depend on it."""
PIECE = 1 << 22
"""Bytes read at a time for the mean of all rows."""


class Source(ABC):
    """A tensor of an input model, as the merge sees it.

    Attributes:
        name: its name in the checkpoint.
        file: the file that holds it (or most of it), for messages.
        dtype: of its elements.
        shape: its sizes.
    """

    name: str
    file: Path
    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * self.dtype.itemsize

    @property
    def needs_torch(self) -> bool:
        """True if reading it imports torch."""
        return False

    @abstractmethod
    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with whole elements, row-major, from byte ``start`` on. Safe from many threads.

        Raises:
            CheckpointError: a file ended early, or a read failed.
        """

    def read_pieces(self, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Fill several buffers, each from a byte of its own on."""
        for start, buffer in pieces:
            self.read_into(start, buffer)


class StoredTensor(Source):
    """A tensor as it lies in a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, stored: Stored) -> None:
        self.checkpoint, self.stored = checkpoint, stored
        self.name, self.file, self.dtype, self.shape = stored.name, stored.file, stored.dtype, stored.shape

    @property
    def needs_torch(self) -> bool:
        """As of :class:`Source`."""
        return self.file.suffix != ".safetensors"

    def read_into(self, start: int, buffer: memoryview) -> None:
        """As of :class:`Source`."""
        self.checkpoint.read_into(self.stored, start, buffer)

    def read_pieces(self, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """As of :class:`Source`."""
        self.checkpoint.read_pieces(self.stored, pieces)


ZERO, MEAN, PADDING = -1, -2, -3
"""Origins of a row that is none model's: zeros; the mean of some rows; the mean of all rows before the padding."""


@dataclass(frozen=True)
class Rows:
    """Where each row of a gathered tensor comes from, in runs of consecutive rows of one origin.

    Attributes:
        starts: the first row of each run, then the number of all rows.
        origins: of each run: number of a part, or :data:`ZERO`, :data:`MEAN` (one row each), :data:`PADDING`.
        firsts: of each run: the row in that part which its first row is.
        means: of a row with origin MEAN: the parts and rows whose mean it is.
    """

    starts: Sequence[int]
    origins: Sequence[int]
    firsts: Sequence[int]
    means: Mapping[int, Sequence[tuple[int, int]]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of all rows."""
        return self.starts[-1]

    @property
    def averages(self) -> bool:
        """True if some rows are means."""
        return bool(self.means) or PADDING in self.origins


class Gathered(Source):
    """Rows of several tensors in a new order, converted to ``dtype``; consecutive rows are read together.

    A row is everything behind the first axis; of a vector, and of a [1, n] table, one element.
    """

    def __init__(self, own: Source, parts: Sequence[Source], rows: Rows, dtype: DType) -> None:
        """``own`` gives name, file and shape, but for the number of rows; ``rows`` refers to ``parts``."""
        self.name, self.file, self.dtype = own.name, own.file, dtype
        self.parts, self.rows = parts, rows
        flat = len(own.shape) == 2 and own.shape[0] == 1
        self.shape = (1, rows.count) if flat else (rows.count, *own.shape[1:])
        self.width = 1 if flat else own.numel // max(own.shape[0], 1)

    @property
    def needs_torch(self) -> bool:
        """As of :class:`Source`."""
        return self.rows.averages or any(p.needs_torch or p.dtype != self.dtype for p in self.parts)

    def read_into(self, start: int, buffer: memoryview) -> None:
        """As of :class:`Source`."""
        row_bytes = self.width * self.dtype.itemsize
        starts, origins, firsts = self.rows.starts, self.rows.origins, self.rows.firsts
        at, end = start, start + len(buffer)
        run = bisect_right(starts, at // max(row_bytes, 1)) - 1
        asked: dict[int, list[tuple[int, memoryview]]] = {}
        while at < end:
            first, origin = starts[run], origins[run]
            stop = min(end, starts[run + 1] * row_bytes)
            piece, inside = buffer[at - start : stop - start], at - first * row_bytes
            if origin >= 0:
                asked.setdefault(origin, []).append((firsts[run] * row_bytes + inside, piece))
            elif origin == ZERO:
                piece[:] = bytes(len(piece))
            elif origin == MEAN:
                piece[:] = self._mean(first)[inside : inside + len(piece)]
            else:
                row = self._padding
                for done in range(0, len(piece), row_bytes):
                    # A piece begins anywhere in a row, and all rows are the same.
                    rest = min(row_bytes, len(piece) - done)
                    turn = (inside + done) % row_bytes
                    piece[done : done + rest] = (row[turn:] + row[:turn])[:rest]
            at, run = stop, run + 1
        for origin, pieces in asked.items():
            self._copy(self.parts[origin], pieces)

    def _copy(self, part: Source, pieces: Sequence[tuple[int, memoryview]]) -> None:
        """Fill pieces from a part, as if that had this dtype."""
        if part.dtype == self.dtype:
            part.read_pieces(pieces)
            return
        ours, theirs = self.dtype.itemsize, part.dtype.itemsize
        stored = [memoryview(bytearray(len(piece) // ours * theirs)) for _, piece in pieces]
        part.read_pieces([(start // ours * theirs, raw) for (start, _), raw in zip(pieces, stored)])
        for (_, piece), raw in zip(pieces, stored):
            _tensor(piece, self.dtype).copy_(_tensor(raw, part.dtype))

    def _mean(self, row: int) -> bytes:
        """The mean of some rows, added in this dtype in the order of the models, as mergekit does."""
        import torch

        total = torch.zeros(self.width, dtype=self.dtype.to_torch())
        members = self.rows.means[row]
        raw = bytearray(self.width * self.dtype.itemsize)
        for part, index in members:
            self._copy(self.parts[part], [(index * len(raw), memoryview(raw))])
            total = total + _tensor(memoryview(raw), self.dtype)
        return bytes(_memory(total / len(members)))

    @functools.cached_property
    def _padding(self) -> bytes:
        """The mean of all rows before the padding."""
        import torch

        row_bytes = self.width * self.dtype.itemsize
        rows = self.rows.starts[self.rows.origins.index(PADDING)]
        total = torch.zeros(self.width, dtype=torch.float64)
        step = max(1, PIECE // row_bytes)
        for first in range(0, rows, step):
            raw = bytearray(min(step, rows - first) * row_bytes)
            self.read_into(first * row_bytes, memoryview(raw))
            total += _tensor(memoryview(raw), self.dtype).view(-1, self.width).double().sum(0)
        return bytes(_memory((total / rows).float().to(self.dtype.to_torch())))


class LowRank(Source):
    """A matrix plus ``scale * left @ right``, added in float32 (float64 for float64) and rounded once to its dtype."""

    def __init__(self, base: Source, factors: Callable[[], tuple[torch.Tensor, torch.Tensor]], scale: float) -> None:
        """``factors`` gives left [rows, r] and right [r, columns], float32; it is called for every piece."""
        self.name, self.file, self.dtype, self.shape = base.name, base.file, base.dtype, base.shape
        self.base, self.factors, self.scale = base, factors, scale

    @property
    def needs_torch(self) -> bool:
        """As of :class:`Source`."""
        return True

    def read_into(self, start: int, buffer: memoryview) -> None:
        """As of :class:`Source`."""
        import torch

        self.base.read_into(start, buffer)
        if not buffer:
            return
        left, right = self.factors()
        values = _tensor(buffer, self.dtype)
        first = start // self.dtype.itemsize
        stop = first + values.numel()
        rows, width = self.shape
        block = BLOCK_ROWS * width
        work = torch.float64 if self.dtype.name == "float64" else torch.float32
        for begin in range(first // block * block, stop, block):
            row = begin // width
            delta = (left[row : min(row + BLOCK_ROWS, rows)] @ right).mul_(self.scale).view(-1)
            low, high = max(begin, first), min(begin + delta.numel(), stop)
            where = values[low - first : high - first]
            where.copy_(where.to(work) + delta[low - begin : high - begin])


def _tensor(memory: memoryview, dtype: DType) -> torch.Tensor:
    """A flat tensor on this memory."""
    import torch

    return torch.frombuffer(memory, dtype=dtype.to_torch())


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
