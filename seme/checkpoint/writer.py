"""Writing a checkpoint: shards of known size, each tensor at its offset, nothing visible before all is on disk.

Everything goes to a staging folder beside the target. ``commit()`` syncs files and folder and renames it into
place, so a reader sees the old state or the whole new model, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seme.checkpoint.descriptors import Descriptors
from seme.checkpoint.safetensors import make_header
from seme.dtypes import DType
from seme.errors import TargetError, reason

OF_A_MODEL = (
    "config.json",
    "seme_config.yml",
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)
"""Files by which a folder is known to be a model, and may be replaced by another one."""


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
    """The staging folder of one merge. Use as a context manager: without ``commit()`` nothing remains of it.

    Attributes:
        committed: the new model is in place.
    """

    def __init__(self, target: Path, plan: Layout, overwrite: bool = False) -> None:
        """Create the staging folder and the shards at full size.

        Raises:
            TargetError: the target is in use by another merge, not empty without ``overwrite``, or not writable.
        """
        self.target, self.layout, self.overwrite = target, plan, overwrite
        self.staging = self._beside("staging")
        self._descriptors = Descriptors(os.O_RDWR)
        self._lock: int | None = None
        self._staged = self.committed = False
        folders = (target.parent, *target.parent.parents)
        self._made = [folder for folder in folders if not folder.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._restore()  # where a commit was cut off between its two renames
            check_free(target, overwrite)
            if self.staging.exists():  # of a merge that was killed
                shutil.rmtree(self.staging)
            self._staged = True
            self.staging.mkdir()
            for name, header, size in zip(plan.files, plan.headers, plan.sizes):
                with open(self.staging / name, "xb", buffering=0) as file:
                    _allocate(file.fileno(), size)
                    _pwrite(file.fileno(), memoryview(header), 0)
        except BaseException as e:
            self.abort()
            if isinstance(e, OSError):
                raise TargetError(f"{e.filename or target}: {reason(e)}{_remedy(e)}") from e
            raise

    def _beside(self, what: str) -> Path:
        return self.target.parent / f".{self.target.name}.seme-{what}"

    def _acquire(self) -> None:
        """Lock the target through a file beside it, which is removed by whoever holds the lock."""
        file = self._beside("lock")
        while self._lock is None:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                os.close(descriptor)
                raise TargetError(
                    f"{self.target}: another merge is writing to it; wait for it or choose another folder"
                ) from e
            except OSError:  # a file system without locks
                pass
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                self._lock = descriptor
            else:  # removed by its holder after it was opened here
                os.close(descriptor)

    def write(self, tensor: str, start: int, data: memoryview) -> None:
        """Put bytes at byte ``start`` of a tensor. Safe from many threads on disjoint ranges."""
        slot = self.layout.slots[tensor]
        file = self.staging / self.layout.files[slot.shard]
        try:
            with self._descriptors.use(file) as descriptor:
                _pwrite(descriptor, data, slot.offset + start)
        except OSError as e:
            raise TargetError(f"{file}: write failed: {reason(e)}") from e

    def index(self) -> None:
        """Write ``model.safetensors.index.json``, if there is more than one shard."""
        if len(self.layout.files) > 1:
            weight_map = {name: self.layout.files[slot.shard] for name, slot in self.layout.slots.items()}
            self.json(
                "model.safetensors.index.json",
                {"metadata": {"total_size": self.layout.total_size}, "weight_map": weight_map},
            )

    def json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file into the model folder."""
        self.text(name, json.dumps(value, indent=2) + "\n")

    def text(self, name: str, value: str) -> None:
        """Write a text file into the model folder."""
        try:
            (self.staging / name).write_text(value, encoding="utf-8")
        except OSError as e:
            raise TargetError(f"{self.staging / name}: write failed: {reason(e)}") from e

    def copy(self, source: Path) -> None:
        """Copy a file or a folder of another model under its own name."""
        try:
            if source.is_dir():
                shutil.copytree(source, self.staging / source.name, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(source, self.staging / source.name)
        except OSError as e:
            raise TargetError(f"{source}: cannot be copied to {self.staging}: {reason(e)}") from e

    def commit(self) -> None:
        """Data to disk, then the folder into its place. Ctrl-C waits until the place is taken and the old model gone.

        Raises:
            TargetError: syncing or renaming failed; the target is as it was.
        """
        try:
            for path in (*self.staging.rglob("*"), self.staging):
                _fsync(path)
            if self.overwrite:
                check_free(self.target, self.overwrite)
            with _uninterrupted():
                self._replace()
        except OSError as e:
            raise TargetError(f"{self.target}: cannot be completed: {reason(e)}") from e

    def _replace(self) -> None:
        previous = self._beside("previous")
        replaces = self.overwrite and self.target.exists()
        if replaces and previous.exists():
            shutil.rmtree(previous)
        try:
            if replaces:
                self.target.rename(previous)
            self.staging.rename(self.target)
        except BaseException:
            self._restore()
            raise
        self.committed = True
        _fsync(self.target.parent)
        if replaces:
            _remove(previous)

    def _restore(self) -> None:
        """Give the target back that was moved away for a new one which did not come."""
        previous = self._beside("previous")
        if previous.exists() and not self.target.exists():
            previous.rename(self.target)

    def abort(self) -> None:
        """Remove the staging folder and all that is in it, and the folders above it that were made for it."""
        with _uninterrupted():
            self._descriptors.close()
            if self._staged:
                _remove(self.staging)
            self._unlock()
            for folder in self._made:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._beside("lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.committed:
            self.abort()
            return
        with _uninterrupted():
            self._descriptors.close()
            self._unlock()


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a target that is a file, or a folder with something in it unless that is a model to be replaced.

    Raises:
        TargetError: it cannot be used.
    """
    try:
        if target.exists() and not target.is_dir():
            raise TargetError(f"{target}: exists and is not a folder")
        if not target.is_dir() or not any(target.iterdir()):
            return
        if not overwrite:
            raise TargetError(f"{target}: not empty; choose another folder or pass --overwrite")
        for what, folder in (("working", "."), ("home", "~")):
            if _holds(target, folder):
                raise TargetError(f"{target}: is or holds the {what} directory, which is never replaced; name another")
        if not any(p.match(pattern) for p in target.iterdir() for pattern in OF_A_MODEL):
            raise TargetError(
                f"{target}: not a model (no config.json and no weights), --overwrite replaces nothing else; "
                "choose another folder"
            )
    except OSError as e:
        raise TargetError(f"{target}: {e.strerror or e}; choose another output folder") from e


def _holds(target: Path, folder: str) -> bool:
    try:
        resolved = Path(os.path.expanduser(folder)).resolve()
    except FileNotFoundError:  # the working directory is no more
        return False
    return target.resolve() in (resolved, *resolved.parents)


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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Delete a folder; one that resists is no error of the merge, but is told."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as e:
        warnings.warn(f"seme: {folder}: cannot be removed: {reason(e)}; delete it by hand", stacklevel=2)


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "; choose another output folder or free the space"
    return "" if error.errno == errno.EMFILE else "; choose another output folder"


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C, and the other signals to stop that Python handles, to the end of the block."""
    arrived: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python handles none
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if callable(signal.getsignal(number)):
                    handlers[number] = signal.signal(number, lambda number, _: arrived.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])
