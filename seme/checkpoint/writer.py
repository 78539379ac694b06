"""Writing a checkpoint: shards of known size, each tensor at its offset, nothing visible before all is on disk.

Everything goes to a staging folder beside the target. ``commit()`` syncs files and folder and renames it into
place, so a reader sees the old state or the whole new model, never a part.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seme.checkpoint.safetensors import make_header
from seme.dtypes import DType
from seme.errors import TargetError


@dataclass(frozen=True)
class Slot:
    """Where an output tensor goes: shard number and absolute byte offset in it."""

    shard: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """The output's weight files, known before the first byte.

    Attributes:
        files: file names, ``model.safetensors`` or ``model-00001-of-0000N.safetensors``.
        headers: the bytes each file begins with.
        sizes: bytes of each file.
        slots: place of every tensor.
        total_size: bytes of tensor data.
    """

    files: tuple[str, ...]
    headers: tuple[bytes, ...]
    sizes: tuple[int, ...]
    slots: dict[str, Slot]
    total_size: int


def layout(tensors: list[tuple[str, DType, tuple[int, ...]]], max_shard: int) -> Layout:
    """Distribute tensors over shards in their order: a shard is closed when the next tensor would pass ``max_shard``
    bytes. Inside a shard wider dtypes come first, so that every tensor is aligned to its element size."""
    shards: list[list[tuple[str, DType, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for name, dtype, shape in tensors:
        nbytes = dtype.itemsize
        for s in shape:
            nbytes *= s
        if shards[-1] and filled + nbytes > max_shard:
            shards.append([])
            filled = 0
        shards[-1].append((name, dtype, shape))
        filled += nbytes
        total += nbytes
    n = len(shards)
    files = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    headers, sizes, slots = [], [], {}
    for i, shard in enumerate(shards):
        header, offsets, size = make_header(sorted(shard, key=lambda t: -t[1].itemsize))
        headers.append(header)
        sizes.append(size)
        slots.update({name: Slot(i, offset) for name, offset in offsets.items()})
    return Layout(tuple(files), tuple(headers), tuple(sizes), slots, total)


class Writer:
    """The staging folder of one merge. Use as a context manager: without ``commit()`` nothing remains of it."""

    def __init__(self, target: Path, plan: Layout, overwrite: bool = False) -> None:
        """Create the staging folder and the shards at full size.

        Raises:
            TargetError: the target is in use by another merge, not empty without ``overwrite``, or not writable.
        """
        self.target, self.layout, self.overwrite = target, plan, overwrite
        self.staging = target.parent / f".{target.name}.seme-staging"
        self._descriptors: list[int] = []
        self._lock = -1
        self._committed = False
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
            self._acquire()
            for stale in self.staging.iterdir():
                if stale.name != ".lock":
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            for name, header, size in zip(plan.files, plan.headers, plan.sizes):
                descriptor = os.open(self.staging / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                self._descriptors.append(descriptor)
                _allocate(descriptor, size)
                _pwrite(descriptor, memoryview(header), 0)
        except OSError as e:
            self.abort()
            raise TargetError(f"{self.staging}: {e.strerror}; choose another output folder or free the space") from e
        except TargetError:
            self._close()
            raise

    def _acquire(self) -> None:
        self._lock = os.open(self.staging / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(self._lock)
            self._lock = -1
            raise TargetError(f"{self.target}: another merge is writing to it; wait for it or choose another folder") from e

    def write(self, tensor: str, start: int, data: memoryview) -> None:
        """Put bytes at byte ``start`` of a tensor. Safe from many threads on disjoint ranges."""
        slot = self.layout.slots[tensor]
        try:
            _pwrite(self._descriptors[slot.shard], data, slot.offset + start)
        except OSError as e:
            raise TargetError(f"{self.staging / self.layout.files[slot.shard]}: write failed: {e.strerror}") from e

    def index(self) -> None:
        """Write ``model.safetensors.index.json``, if there is more than one shard."""
        if len(self.layout.files) > 1:
            weight_map = {name: self.layout.files[slot.shard] for name, slot in self.layout.slots.items()}
            self.json("model.safetensors.index.json", {"metadata": {"total_size": self.layout.total_size}, "weight_map": weight_map})

    def json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file into the model folder."""
        self.text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def text(self, name: str, value: str) -> None:
        """Write a text file into the model folder."""
        (self.staging / name).write_text(value, encoding="utf-8")

    def copy(self, source: Path) -> None:
        """Copy a file or a folder of another model under its own name."""
        if source.is_dir():
            shutil.copytree(source, self.staging / source.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, self.staging / source.name)

    def commit(self) -> None:
        """Data to disk, then the folder into its place.

        Raises:
            TargetError: syncing or renaming failed; the target is as it was.
        """
        try:
            for descriptor in self._descriptors:
                os.fsync(descriptor)
            for path in self.staging.rglob("*"):
                if path.name not in self.layout.files and path.is_file():
                    _fsync_path(path)
            (self.staging / ".lock").unlink()
            _fsync_path(self.staging)
            previous = None
            if self.overwrite and self.target.exists():
                previous = self.target.parent / f".{self.target.name}.seme-previous"
                if previous.exists():
                    shutil.rmtree(previous)
                self.target.rename(previous)
            try:
                self.staging.rename(self.target)
            except OSError:
                if previous is not None:
                    previous.rename(self.target)
                raise
            self._committed = True
            _fsync_path(self.target.parent)
            if previous is not None:
                shutil.rmtree(previous)
        except OSError as e:
            raise TargetError(f"{self.target}: cannot be completed: {e.strerror}") from e

    def abort(self) -> None:
        """Remove the staging folder and all that is in it."""
        self._close()
        shutil.rmtree(self.staging, ignore_errors=True)

    def _close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._committed:
            self._close()
        else:
            self.abort()


def _allocate(descriptor: int, size: int) -> None:
    """Give a file its size, with the blocks reserved where the file system can, so that a full disk shows now."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):  # one call takes at most 2 GiB
        done += os.pwrite(descriptor, data[done:], offset + done)


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
