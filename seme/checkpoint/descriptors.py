"""Open files, fewer than the process may have.

A merge may read and write more shards than ``ulimit -n`` allows, and opening a file for every chunk is slow on a
network. So files stay open, and the least recently used ones are closed for others; never one that is in use.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

MOST = 128
"""Files open at once, all checkpoints and the writer together; half of ``ulimit -n`` if that is less."""


@dataclass
class _File:
    descriptor: int
    users: int = 0


class Descriptors:
    """The open files of one checkpoint or writer. Safe from many threads."""

    _lock = threading.Lock()
    _closed: ClassVar[deque[Descriptors]] = deque()  # whose files are to be closed by whoever gets the lock next
    _open: ClassVar[dict[tuple[Descriptors, Path], _File]] = {}  # of all of them, the least recently used first

    def __init__(self, flags: int) -> None:
        self.flags = flags

    @contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """The descriptor of a file, which stays open in the block even if :meth:`close` is called meanwhile."""
        with self._lock:
            file = self._open.pop((self, path), None)
            if file is None:
                self._make_room()
                file = _File(os.open(path, self.flags))
            self._open[self, path] = file
            file.users += 1
        try:
            self._sweep()
            yield file.descriptor
        finally:
            with self._lock:
                file.users -= 1
                if file.users == 0 and self._open.get((self, path)) is not file:
                    os.close(file.descriptor)
            self._sweep()

    def close(self) -> None:
        """Close them; a later :meth:`use` opens them again.

        Never waits: the garbage collector may call it anywhere, also in a thread that has the lock.
        """
        self._closed.append(self)
        self._sweep()

    @classmethod
    def _sweep(cls) -> None:
        while cls._closed and cls._lock.acquire(blocking=False):  # who has the lock sweeps when it is free again
            try:
                while cls._closed:
                    owner = cls._closed.popleft()
                    for key in [k for k in cls._open if k[0] is owner]:
                        cls._drop(key)
            finally:
                cls._lock.release()

    @classmethod
    def _make_room(cls) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = MOST if limit == resource.RLIM_INFINITY else min(MOST, limit // 2)
        idle = [key for key, file in cls._open.items() if file.users == 0]
        for key in idle[: max(0, len(cls._open) + 1 - most)]:
            cls._drop(key)

    @classmethod
    def _drop(cls, key: tuple[Descriptors, Path]) -> None:
        file = cls._open.pop(key)
        if file.users == 0:  # else whoever uses it closes it
            os.close(file.descriptor)
