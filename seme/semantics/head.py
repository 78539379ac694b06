"""The LM head of a model, row by row: in memory, or read from its checkpoint a tile at a time."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from seme.checkpoint import Checkpoint, ModelRef, Stored, resolve
from seme.errors import CheckpointError, SemeError

if TYPE_CHECKING:
    import torch

    from seme.roles import Override

    Index = slice | torch.Tensor
    """Rows: a slice with both ends given and no step, or indices (int64, on the CPU) in any order."""

ROWS = 4096
"""Rows of a tile, wherever a pass over all labels is made in tiles. Sums are formed tile by tile, in this order."""


@dataclass(frozen=True)
class Head:
    """The head W, one row per label: ``logits = W (gain * h)`` for a normalised latent vector h.

    Attributes:
        name: what messages call it.
        size: number of labels, v.
        width: width of the latent space, d.
        dtype: torch dtype of the weights as stored.
        device: torch device the rows are given on.
        read: the rows of an index, [n, d].
        gain: gain of the final norm, [d] float64; None if there is none or it is not wanted.
        folder: the folder it comes from, which has the tokenizer; None for a bare matrix.
    """

    name: str
    size: int
    width: int
    dtype: torch.dtype
    device: torch.device
    read: Callable[[Index], torch.Tensor]
    gain: torch.Tensor | None = None
    folder: Path | None = None

    @property
    def working_dtype(self) -> torch.dtype:
        """What bases of this head are computed and given in: float32, float64 for a float64 head."""
        import torch

        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def tiles(self) -> Iterator[slice]:
        """All labels, in slices of :data:`ROWS`."""
        for start in range(0, self.size, ROWS):
            yield slice(start, min(start + ROWS, self.size))

    def digest(self) -> str:
        """A hash of all that bases depend on: the bytes of the head, its shape and dtype, the gain, kind of device."""
        import torch

        found = hashlib.blake2b(f"{self.size} {self.width} {self.dtype} {self.device.type}".encode(), digest_size=16)
        found.update(b"plain" if self.gain is None else self.gain.cpu().numpy().tobytes())
        for tile in self.tiles():
            found.update(self.read(tile).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


def of_matrix(weight: torch.Tensor, gain: torch.Tensor | None) -> Head:
    """The head given as a matrix [v, d]; bases are computed on its device."""
    import torch

    for what, x, dims in (("head", weight, 2), ("gain", gain, 1)):
        if x is not None and (x.dim() != dims or not x.is_floating_point() or x.itemsize < 2 or x.numel() == 0):
            raise SemeError(
                f"semantic bases: {what}: shape {list(x.shape)} of {x.dtype}; "
                f"expected {dims} axes of bfloat16, float16, float32 or float64"
            )
    if gain is not None:
        if len(gain) != weight.shape[1]:
            raise SemeError(f"semantic bases: gain: {len(gain)} entries for a head of width {weight.shape[1]}")
        gain = gain.detach().to(weight.device, torch.float64)
    weight = weight.detach()

    def read(index: Index) -> torch.Tensor:
        return weight[index]

    return Head("head", weight.shape[0], weight.shape[1], weight.dtype, weight.device, read, gain)


def of_checkpoint(path: str | Path | ModelRef, fold_norm: bool, device: str, roles: Sequence[Override] = ()) -> Head:
    """The head of a checkpoint: read from its file a tile at a time on the CPU, held on any other device.

    Raises:
        CheckpointError: not a checkpoint, no head in it, or a head or gain that cannot be used.
        BackendError: no such device.
    """
    import torch

    from seme.gpu import check
    from seme.roles import latent

    check("torch", device, auto=False)  # refuses a device that is not there
    checkpoint = Checkpoint(resolve(path if isinstance(path, ModelRef) else ModelRef(str(path))))
    try:
        try:
            shapes = {name: t.shape for name, t in checkpoint.tensors.items()}
            space = latent(checkpoint.config, shapes, roles)
        except CheckpointError as e:
            raise CheckpointError(f"{checkpoint.path}: {e}") from e
        stored = _find(checkpoint, space.head, (None, space.hidden_size))
        gain = None
        if fold_norm and space.final_norm is not None:
            norm = _find(checkpoint, space.final_norm, (space.hidden_size,))
            gain = read_rows(checkpoint, norm, slice(0, space.hidden_size)).double() + space.norm_offset
            if not bool(gain.isfinite().all()):
                raise CheckpointError(f"{norm.file}: tensor {norm.name}: has inf or NaN in it; repair the model")

        place = torch.device(device)
        held = None
        if place.type != "cpu":
            held = read_rows(checkpoint, stored, slice(0, stored.shape[0])).to(place)
            gain = gain if gain is None else gain.to(place)

        def read(index: Index) -> torch.Tensor:
            return read_rows(checkpoint, stored, index) if held is None else held[index]

    except BaseException:
        checkpoint.close()
        raise
    v, d = stored.shape
    name = f"{stored.file}: tensor {stored.name}"
    head = Head(name, v, d, stored.dtype.to_torch(), place, read, gain, checkpoint.path)
    weakref.finalize(head, checkpoint.close)
    return head


def _find(checkpoint: Checkpoint, name: str, shape: tuple[int | None, ...]) -> Stored:
    """The tensor ``name``, if it is one of floats and of this shape (None: any size from 1 on)."""
    if name not in checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.path}: no tensor {name}, so there is no head to take bases from")
    found = checkpoint.tensors[name]
    if not found.dtype.mergeable:
        raise CheckpointError(
            f"{found.file}: tensor {name}: {found.dtype}; bases need bfloat16, float16, float32 or float64"
        )
    if len(found.shape) != len(shape) or not all(a == b or (b is None and a) for a, b in zip(found.shape, shape)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise CheckpointError(f"{found.file}: tensor {name} has shape {list(found.shape)}, expected [{wanted}]")
    return found


def read_rows(checkpoint: Checkpoint, stored: Stored, index: Index, columns: slice | None = None) -> torch.Tensor:
    """Rows of a stored matrix (or elements of a vector), in the dtype stored, on the CPU.

    Args:
        checkpoint: the checkpoint.
        stored: a tensor of one axis or more; all but the first make up a row.
        index: which rows. Each run of neighbours is one read.
        columns: a part of each row, both ends given; default: all of it.
    """
    import torch

    width = 1
    for n in stored.shape[1:]:
        width *= n
    left, right = (0, width) if columns is None else (columns.start, columns.stop)
    take = right - left
    rows = range(index.start, index.stop) if isinstance(index, slice) else index.tolist()
    out = torch.empty((len(rows), take), dtype=stored.dtype.to_torch())
    buffer = out.view(-1).view(torch.uint8).numpy().data
    size = stored.dtype.itemsize
    for first, last in _runs(rows, whole=take == width):
        begin, end = first * take * size, last * take * size
        if end > begin:
            checkpoint.read_into(stored, (rows[first] * width + left) * size, buffer[begin:end])
    return out.view(-1) if len(stored.shape) == 1 else out


def _runs(rows: range | list[int], whole: bool) -> Iterator[tuple[int, int]]:
    """Positions ``[first, last)`` in ``rows`` of neighbours that lie in the file one after the other."""
    if isinstance(rows, range) and whole:
        yield 0, len(rows)
        return
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or not whole or rows[i] != rows[i - 1] + 1:
            yield first, i
            first = i
