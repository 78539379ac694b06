"""``seme_manifest.json``: a hash of every tensor and file of a model, by which a copy of it is known to be whole.

::

    {"format": 1, "seme": "0.1.0", "algorithm": "blake2b-128",
     "tensors": {NAME: {"file": SHARD, "dtype": "bfloat16", "shape": [8, 8], "hash": HEX}},
     "shards": {SHARD: HEX of all before the data}, "files": {PATH: HEX}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from seme import __version__
from seme.checkpoint.reader import Checkpoint, Reader
from seme.checkpoint.safetensors import Stored
from seme.errors import TargetError, reason

NAME = "seme_manifest.json"
FORMAT = 1
ALGORITHM = "blake2b-128"
PIECE = 1 << 22
"""Bytes in memory at a time, per thread."""

T = TypeVar("T")
R = TypeVar("R")


def new_hash() -> hashlib.blake2b:
    """A hash of :data:`ALGORITHM`; it lets other threads run while it is fed."""
    return hashlib.blake2b(digest_size=16)


def write(folder: Path, threads: int) -> None:
    """Write the manifest of a model folder, from what can be read of it now.

    Raises:
        TargetError: a file cannot be read or written.
        CheckpointError: the weights cannot be read.
    """
    with Checkpoint(folder) as model:

        def entry(tensor: Stored) -> dict[str, Any]:
            hash = new_hash()
            buffer = memoryview(bytearray(min(PIECE, tensor.nbytes)))
            for piece in pieces(model, tensor, buffer):
                hash.update(piece)
            return described(tensor, hash.hexdigest())

        tensors = list(model.tensors.values())
        weights = model.files
        entries = dict(zip(model.tensors, in_threads(entry, tensors, threads)))
    try:
        found = {
            "format": FORMAT,
            "seme": __version__,
            "algorithm": ALGORITHM,
            "tensors": entries,
            "shards": {file.name: hash_header(file) for file in weights},
            "files": {
                file.relative_to(folder).as_posix(): hash_file(file)
                for file in sorted(folder.rglob("*"))
                if file.is_file() and file not in weights and file != folder / NAME
            },
        }
        (folder / NAME).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise TargetError(f"{e.filename or folder / NAME}: {reason(e)}; merge again", fault=True) from e


def described(tensor: Stored, hash: str) -> dict[str, Any]:
    """A tensor as the manifest has it."""
    return {"file": tensor.file.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape), "hash": hash}


def pieces(reader: Reader, tensor: Stored, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of a tensor, one buffer after the other."""
    for start in range(0, tensor.nbytes, PIECE):
        piece = buffer[: min(PIECE, tensor.nbytes - start)]
        reader.read_into(tensor, start, piece)
        yield piece


def hash_file(path: Path, size: int | None = None) -> str:
    """The hash of a file, or of its first bytes."""
    hash, left = new_hash(), size
    with path.open("rb") as f:
        while data := f.read(PIECE if left is None else min(PIECE, left)):
            hash.update(data)
            left = None if left is None else left - len(data)
    return hash.hexdigest()


def hash_header(path: Path) -> str:
    """The hash of a safetensors file up to its data."""
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
    return hash_file(path, 8 + length)


def in_threads(work: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """The results in order; what has not begun is given up when the caller stops."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(work, items)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
