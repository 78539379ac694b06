"""The journal of a merge: what of its output is written, so that a merge which was stopped can go on.

A text file beside the staging folder. Its first line, JSON, says what the merge is made of. Then, in order:

    w TENSOR START SIZE   these bytes of the tensor (by its number in the layout) are in their shard
    t TENSOR JSON         what the method told of the tensor, for the merge report
    s OFFSET              what the journal's first OFFSET bytes tell is on disk: the shards were synced meanwhile
    c INODE               all is on disk, and the staging folder, which has this inode, is about to be renamed

A line is written after its data, so it never tells of bytes that are not there. What a killed process wrote is still in
the page cache; after a restart of the machine only what a line ``s`` covers is believed.
"""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Ranges = list[tuple[int, int]]
Identity = Mapping[str, Any]


def boot() -> str | None:
    """What tells one start of the machine from the next; None where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


class Journal:
    """An open journal. Safe from many threads.

    Attributes:
        identity: what the merge is made of, as given by whoever began it.
        done: the bytes of each tensor that were written before this process, as sorted ranges ``(start, stop)``.
        told: what the method told of tensors before this process.
        committed: inode of the folder that was about to be renamed, or None.
    """

    def __init__(self, file: Path, identity: Identity) -> None:
        """A journal that is not yet on disk; see :meth:`begin`."""
        self.file, self.identity = file, identity
        self.done: dict[int, Ranges] = {}
        self.told: dict[int, Any] = {}
        self.committed: int | None = None
        self._descriptor: int | None = None
        self._size = 0
        self._wrote = False
        self._lock = threading.Lock()

    @classmethod
    def read(cls, file: Path) -> Journal | None:
        """What a process left behind, as far as it can be believed; None if it had not begun.

        Raises:
            OSError: the file cannot be read.
        """
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return None
        lines = data.split(b"\n")[:-1]  # a last line without its end was cut off
        try:
            first = json.loads(lines[0])
            found = cls(file, first["identity"])
            same_boot = first["boot"] is not None and first["boot"] == boot()
        except (ValueError, TypeError, KeyError, IndexError):
            return None
        found._believe(lines, len(data) if same_boot else 0)
        return found

    def _believe(self, lines: list[bytes], believed: int) -> None:
        """Take the lines below ``believed`` bytes and those that were synced."""
        at, parsed = len(lines[0]) + 1, []
        for line in lines[1:]:
            try:
                kind, *rest = line.split(b" ", 3)
                if kind == b"w":
                    tensor, start, size = map(int, rest)
                    parsed.append((at, tensor, (start, start + size)))
                elif kind == b"t":
                    parsed.append((at, int(rest[0]), json.loads(line.split(b" ", 2)[2], object_hook=_from_json)))
                elif kind == b"s":
                    believed = max(believed, int(rest[0]))
                elif kind == b"c":
                    self.committed = int(rest[0])
                else:
                    break
            except (ValueError, IndexError):  # of a disk that lost power: from here on nothing is told
                break
            at += len(line) + 1
        for offset, tensor, what in parsed:
            if offset < believed:
                if isinstance(what, tuple):
                    self.done.setdefault(tensor, []).append(what)
                else:
                    self.told[tensor] = what
        self.done = {tensor: _merged(ranges) for tensor, ranges in self.done.items()}

    def begin(self) -> None:
        """Put the journal on disk, with what is done so far, all of which is on disk already.

        Raises:
            OSError: it cannot be written.
        """
        lines = [json.dumps({"boot": boot(), "identity": self.identity}, separators=(",", ":"))]
        lines += [f"w {tensor} {a} {b - a}" for tensor, ranges in self.done.items() for a, b in ranges]
        lines += [f"t {tensor} {_to_json(what)}" for tensor, what in self.told.items()]
        text = ("\n".join(lines) + "\n").encode()
        text += f"s {len(text)}\n".encode()
        part = self.file.with_name(self.file.name + ".part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        self._descriptor, self._size = descriptor, 0
        self._append(text)
        os.fsync(descriptor)
        part.replace(self.file)

    def wrote(self, tensor: int, start: int, size: int) -> None:
        """Bytes of a tensor are in their shard.

        Raises:
            OSError: the journal cannot be written; the same for the methods below.
        """
        self._append(b"w %d %d %d\n" % (tensor, start, size))
        self._wrote = True

    def tell(self, tensor: int, what: Any) -> None:
        """Keep what the method told of a tensor: JSON, in which torch tensors of float32 may be."""
        self._append(f"t {tensor} {_to_json(what)}\n".encode())

    def position(self) -> int:
        """Its size now: what it tells up to here is on disk once the shards have been synced."""
        with self._lock:
            return self._size

    def synced(self, position: int) -> None:
        """The shards were synced after the journal had that size."""
        self._append(b"s %d\n" % position)
        self._sync()

    def commit(self, inode: int) -> None:
        """All is on disk, the staging folder with this inode is about to be renamed."""
        self._append(b"c %d\n" % inode)
        self._sync()

    def has(self, tensor: int, start: int, size: int) -> bool:
        """True if these bytes were written before this process."""
        return any(a <= start and start + size <= b for a, b in self.done.get(tensor, ()))

    @property
    def began(self) -> bool:
        """True if there is something to go on with."""
        return self._wrote or bool(self.done)

    def _append(self, data: bytes) -> None:
        with self._lock:
            if self._descriptor is None:  # of a writer that keeps none
                return
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
            self._size += len(data)

    def _sync(self) -> None:
        if self._descriptor is not None:
            os.fdatasync(self._descriptor) if hasattr(os, "fdatasync") else os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file, which stays."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def forget(self) -> None:
        """Nothing of this merge is to be believed."""
        self.remove()
        self.done, self.told, self._wrote = {}, {}, False

    def remove(self) -> None:
        """Close the file and delete it."""
        self.close()
        self.file.unlink(missing_ok=True)
        self.file.with_name(self.file.name + ".part").unlink(missing_ok=True)


def _merged(ranges: Ranges) -> Ranges:
    """Sorted, what touches or overlaps as one."""
    found: Ranges = []
    for a, b in sorted(ranges):
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(b, found[-1][1]))
        else:
            found.append((a, b))
    return found


def _to_json(what: Any) -> str:
    def tensor(value: Any) -> dict[str, Any]:
        data = value.detach().cpu().contiguous().numpy()
        return {"float32": base64.b64encode(data.tobytes()).decode("ascii"), "shape": list(data.shape)}

    return json.dumps(what, separators=(",", ":"), default=tensor)


def _from_json(found: dict[str, Any]) -> Any:
    if found.keys() != {"float32", "shape"}:
        return found
    import torch

    return torch.frombuffer(bytearray(base64.b64decode(found["float32"])), dtype=torch.float32).view(found["shape"])
