"""Writing a checkpoint: shards of known size, each tensor at its offset, nothing visible before all is on disk.

Everything goes to a staging folder beside the target. ``commit()`` syncs files and folder and renames it into
place, so a reader sees the old state or the whole new model, never a part. A journal beside it tells what is written,
so that a merge which was killed, or stopped by a full disk, can go on.
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
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seme.checkpoint.descriptors import Descriptors
from seme.checkpoint.journal import Identity, Journal
from seme.checkpoint.safetensors import make_header
from seme.dtypes import DType
from seme.errors import SemeError, TargetError, reason
from seme.sizes import format_size

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


SYNC_EVERY_S = 60.0
"""Seconds of work that a power cut may cost: so often what is written is synced to disk and the journal told."""


def beside(target: Path, what: str) -> Path:
    """The path of something that belongs to the merge into ``target``: ``staging``, ``journal``, ``lock``, ..."""
    return target.parent / f".{target.name}.seme-{what}"


class Writer:
    """The staging folder of one merge. Use as a context manager: without ``commit()`` nothing remains of it, unless
    there is something to go on with.

    Attributes:
        committed: the new model is in place.
        kept: after the context: the staging folder is still there, for ``resume``.
    """

    def __init__(
        self,
        target: Path,
        plan: Layout,
        overwrite: bool = False,
        identity: Identity | None = None,
        resume: Callable[[Identity], str | None] | None = None,
    ) -> None:
        """Create the staging folder and the shards at full size, or go on with those of an earlier process.

        Args:
            target: the new model folder.
            plan: its weight files.
            overwrite: it may exist, if it is a model.
            identity: what the merge is made of, for the journal; None keeps none, and nothing is left of a failure.
            resume: go on with an unfinished merge, if there is one; is given its identity and says why it is another
                merge than this one, or None.

        Raises:
            TargetError: the target is in use by another merge, not empty without ``overwrite``, not writable, or
                belongs to an unfinished merge that is another one.
        """
        self.target, self.layout, self.overwrite = target, plan, overwrite
        self.staging = beside(target, "staging")
        self._numbers = {name: i for i, name in enumerate(plan.slots)}
        self._journal = Journal(beside(target, "journal"), identity or {})
        self._journaled, self.kept = identity is not None, False
        self._dirty: set[Path] = set()  # shards with data that are not known to be on disk
        self._dirtying, self._syncing = threading.Lock(), threading.Lock()
        self._synced = time.monotonic()
        self._descriptors = Descriptors(os.O_RDWR)
        self._lock: int | None = None
        self._staged = self.committed = False
        folders = (target.parent, *target.parent.parents)
        self._made = [folder for folder in folders if not folder.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            if resume is not None and self._resumed(resume):
                self._restore()  # where a commit was cut off between its two renames
                check_free(target, overwrite)
                self._clear()
            else:
                self._restore()
                check_free(target, overwrite)
                self._journal.remove()
                if self.staging.exists():  # of a merge that was killed
                    shutil.rmtree(self.staging)
                self._staged = True
                self.staging.mkdir()
            for name, header, size in zip(plan.files, plan.headers, plan.sizes):
                self._create(self.staging / name, header, size)
            if self._journaled:
                if self._journal.done:
                    self._sync_files(self.staging / name for name in plan.files)
                self._journal.begin()
        except BaseException as e:
            self.abort(keep=not isinstance(e, SemeError) or e.fault)
            if isinstance(e, OSError):
                raise TargetError(f"{e.filename or target}: {reason(e)}{_remedy(e)}", fault=True) from e
            raise

    def _create(self, file: Path, header: bytes, size: int) -> None:
        """A shard with its header, at full size; one that is there keeps its data."""
        try:
            with open(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as shard:
                _allocate(shard.fileno(), size)
                _pwrite(shard.fileno(), memoryview(header), 0)
        except OSError as e:
            raise TargetError(f"{file} of {format_size(size)}: {reason(e)}{_remedy(e)}", fault=True) from e

    def _resumed(self, other: Callable[[Identity], str | None]) -> bool:
        """Take over what an earlier process wrote; False if it left nothing.

        Raises:
            TargetError: it is of another merge.
        """
        journal = Journal.read(self._journal.file)
        if journal is None or not self.staging.is_dir():
            return False
        difference = other(journal.identity)
        if difference is not None:
            raise TargetError(
                f"{self.target}: the unfinished merge cannot be resumed: {difference}; "
                "undo that, or start over without --resume"
            )
        for name, size in zip(self.layout.files, self.layout.sizes):
            path = self.staging / name
            if not path.is_file() or path.stat().st_size != size:
                raise TargetError(
                    f"{path}: is not as the unfinished merge left it, so it cannot be resumed; "
                    "start over without --resume"
                )
        journal.identity = self._journal.identity
        self._journal = journal
        return True

    def _clear(self) -> None:
        """Remove the small files of an earlier process, which are written again."""
        self._staged = True
        for path in self.staging.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in self.layout.files:
                path.unlink()

    def _sync_files(self, files: Iterable[Path]) -> None:
        try:
            for file in files:
                _fsync(file)
        except OSError:
            # What is in the page cache now may not be what reaches the disk, and the next fsync would not say so.
            self._journal.forget()
            raise

    def _acquire(self) -> None:
        """Lock the target through a file beside it, which is removed by whoever holds the lock."""
        file = beside(self.target, "lock")
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
            if self._journaled:
                with self._dirtying:
                    self._dirty.add(file)
                self._journal.wrote(self._numbers[tensor], start, len(data))
                if time.monotonic() - self._synced > SYNC_EVERY_S and self._syncing.acquire(blocking=False):
                    try:
                        self._sync()
                    finally:
                        self._syncing.release()
        except OSError as e:
            raise TargetError(f"{file}: write failed: {reason(e)}{_remedy(e)}", fault=True) from e

    def _sync(self) -> None:
        """Put what is written to disk, then tell the journal."""
        position = self._journal.position()
        with self._dirtying:
            files, self._dirty = self._dirty, set()
        self._sync_files(files)
        self._journal.synced(position)
        self._synced = time.monotonic()

    def has(self, tensor: str, start: int, size: int) -> bool:
        """True if these bytes of a tensor were written by an earlier process that this one goes on with."""
        return bool(self._journal.done) and self._journal.has(self._numbers[tensor], start, size)

    def tell(self, tensor: str, what: Any) -> None:
        """Keep what the method told of a tensor, for :meth:`told` of a process that goes on with this merge."""
        if self._journaled:
            try:
                self._journal.tell(self._numbers[tensor], what)
            except OSError as e:
                raise TargetError(f"{self._journal.file}: write failed: {reason(e)}{_remedy(e)}", fault=True) from e

    def told(self, tensor: str) -> Any:
        """What an earlier process told of a tensor, or None."""
        return self._journal.told.get(self._numbers[tensor])

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
            raise TargetError(f"{self.staging / name}: write failed: {reason(e)}{_remedy(e)}", fault=True) from e

    def copy(self, source: Path) -> None:
        """Copy a file or a folder of another model under its own name."""
        try:
            if source.is_dir():
                (self.staging / source.name).mkdir()
                for file in sorted(source.iterdir()):
                    if file.is_file():  # no folders, which may be links to where they are in, and no pipes
                        shutil.copyfile(file, self.staging / source.name / file.name)
            else:
                shutil.copyfile(source, self.staging / source.name)
        except OSError as e:
            raise TargetError(f"{source}: cannot be copied to {self.staging}: {reason(e)}", fault=True) from e

    def commit(self) -> None:
        """Data to disk, then the folder into its place. Ctrl-C waits until the place is taken and the old model gone.

        Raises:
            TargetError: syncing or renaming failed; the target is as it was.
        """
        try:
            self._sync_files((*self.staging.rglob("*"), self.staging))
            if self.overwrite:
                check_free(self.target, self.overwrite)
            if self._journaled:
                self._journal.commit(self.staging.stat().st_ino)
            with _uninterrupted():
                self._replace()
        except SemeError as e:
            e.fault = True  # whatever became of the target meanwhile, the work is done and is kept
            raise
        except OSError as e:
            raise TargetError(f"{self.target}: cannot be completed: {reason(e)}", fault=True) from e

    def _replace(self) -> None:
        previous = beside(self.target, "previous")
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
        self._journal.remove()

    def _restore(self) -> None:
        """Give the target back that was moved away for a new one which did not come."""
        previous = beside(self.target, "previous")
        if previous.exists() and not self.target.exists():
            previous.rename(self.target)

    def abort(self, keep: bool = False) -> None:
        """Remove the staging folder and all that is in it, and the folders above it that were made for it.

        Args:
            keep: leave it for ``resume``, if something of the model is in it.
        """
        with _uninterrupted():
            self._descriptors.close()
            self.kept = keep and self._staged and self._journaled and self._journal.began
            if self.kept:
                self._journal.close()
            elif self._staged:
                self._journal.remove()
                _remove(self.staging)
            self._unlock()
            for folder in self._made:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            beside(self.target, "lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self.committed:
            # Of a mistake in the recipe or the models nothing is worth keeping: the merge will be another one.
            self.abort(keep=error is not None and (not isinstance(error, SemeError) or error.fault))
            return
        with _uninterrupted():
            self._descriptors.close()
            self._unlock()


def completed(target: Path) -> Identity | None:
    """What the model in ``target`` is made of, if its merge was killed when it was in place already; else None."""
    journal = Journal.read(beside(target, "journal")) if target.is_dir() else None
    if journal is None or journal.committed is None or journal.committed != target.stat().st_ino:
        return None
    return journal.identity


def tidy(target: Path) -> None:
    """Remove what a merge left that was killed when the model was in place already."""
    for what in ("previous", "staging"):
        _remove(beside(target, what))
    for what in ("journal", "lock"):
        beside(target, what).unlink(missing_ok=True)


def reserved(target: Path) -> int:
    """Bytes of disk that an unfinished merge into ``target`` has taken."""
    try:
        return sum(path.stat().st_blocks * 512 for path in beside(target.resolve(), "staging").iterdir())
    except OSError:
        return 0


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
