"""Where the elements of an input tensor come from.

Most lie in a checkpoint as the merge reads them. Others are made while they are read, piece by piece and in a memory
that does not depend on the tensor: rows gathered from one or several models, where vocabularies differ
(:class:`Gathered`), and a matrix to which a low-rank product is added, for LoRA adapters (:class:`LowRank`). The
engines know :class:`Source` only.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seme.checkpoint import Checkpoint, Stored
from seme.dtypes import DType

if TYPE_CHECKING:
    import numpy as np
    import torch

    Int64 = np.ndarray[Any, np.dtype[np.int64]]

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

    def read_runs(self, starts: Int64, places: Int64, sizes: Int64, buffer: memoryview) -> None:
        """Read many runs of bytes at once: ``sizes`` bytes each, from ``starts`` in the tensor to ``places`` in the
        buffer."""
        for start, place, size in zip(starts.tolist(), places.tolist(), sizes.tolist()):
            self.read_into(start, buffer[place : place + size])


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

    def read_runs(self, starts: Int64, places: Int64, sizes: Int64, buffer: memoryview) -> None:
        """As of :class:`Source`."""
        self.checkpoint.read_runs(self.stored, starts, places, sizes, buffer)


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

    @functools.cached_property
    def arrays(self) -> tuple[Int64, Int64, Int64]:
        """``starts``, ``origins`` and ``firsts``."""
        import numpy as np

        starts, origins, firsts = (np.array(x, dtype=np.int64) for x in (self.starts, self.origins, self.firsts))
        return starts, origins, firsts

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
        import numpy as np

        if not buffer:
            return
        row_bytes, end = self.width * self.dtype.itemsize, start + len(buffer)
        starts, origins, firsts = self.rows.arrays
        low = int(np.searchsorted(starts, start // row_bytes, side="right")) - 1
        high = int(np.searchsorted(starts, -(-end // row_bytes)))
        runs, origin = starts[low:high] * row_bytes, origins[low:high]
        begins = np.maximum(runs, start)
        sizes = np.minimum(starts[low + 1 : high + 1] * row_bytes, end) - begins
        inside, places = begins - runs, begins - start
        for part in np.unique(origin[origin >= 0]).tolist():
            of = origin == part
            self._copy(self.parts[part], firsts[low:high][of] * row_bytes + inside[of], places[of], sizes[of], buffer)
        for i in np.flatnonzero(origin < 0).tolist():
            piece = buffer[int(places[i]) : int(places[i] + sizes[i])]
            self._make(int(origin[i]), int(starts[low + i]), int(inside[i]), piece)

    def _make(self, origin: int, first: int, inside: int, piece: memoryview) -> None:
        """Fill a piece of a run that is none model's, from byte ``inside`` of the run on, which begins in row
        ``first``."""
        if origin == ZERO:
            piece[:] = bytes(len(piece))
        elif origin == MEAN:
            piece[:] = self._mean(first)[inside : inside + len(piece)]
        else:
            row = self._padding
            for done in range(0, len(piece), len(row)):
                # A piece begins anywhere in a row, and all rows are the same.
                rest = min(len(row), len(piece) - done)
                turn = (inside + done) % len(row)
                piece[done : done + rest] = (row[turn:] + row[:turn])[:rest]

    def _copy(self, part: Source, starts: Int64, places: Int64, sizes: Int64, buffer: memoryview) -> None:
        """Read runs of a part, as if that had this dtype."""
        import numpy as np

        if part.dtype == self.dtype:
            part.read_runs(starts, places, sizes, buffer)
            return
        ours, theirs = self.dtype.itemsize, part.dtype.itemsize
        ends = np.cumsum(sizes)
        stored = memoryview(bytearray(int(ends[-1]) // ours * theirs))
        part.read_runs(starts // ours * theirs, (ends - sizes) // ours * theirs, sizes // ours * theirs, stored)
        made = _memory(_tensor(stored, part.dtype).to(self.dtype.to_torch()))
        for place, size, stop in zip(places.tolist(), sizes.tolist(), ends.tolist()):
            buffer[place : place + size] = made[stop - size : stop]

    def _mean(self, row: int) -> bytes:
        """The mean of some rows, added in this dtype in the order of the models, as mergekit does."""
        import numpy as np
        import torch

        total = torch.zeros(self.width, dtype=self.dtype.to_torch())
        members = self.rows.means[row]
        raw = bytearray(self.width * self.dtype.itemsize)
        for part, index in members:
            start, place, size = (np.array([n], dtype=np.int64) for n in (index * len(raw), 0, len(raw)))
            self._copy(self.parts[part], start, place, size, memoryview(raw))
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
