"""The header of a safetensors file, read as if a stranger had written it.

Layout: 8 bytes little-endian header size, the header (JSON), the data. The header must list tensors that cover
the data exactly, without hole or overlap, so that no byte outside the file is ever addressed. Stricter than the
format's own library in two points: a name listed twice and a path-like name are refused.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from seme import dtypes
from seme.dtypes import DType
from seme.errors import CheckpointError, brief, cannot_read

MAX_HEADER = 100_000_000
"""Bytes of header that are accepted, the limit of the format's own library."""


class Stored(NamedTuple):
    """Where a tensor lies: dtype, shape, file, byte offset in that file, bytes."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return self.nbytes // self.dtype.itemsize


def read_header(path: Path) -> list[Stored]:
    """All tensors of a safetensors file, in the order of their data.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is not what the format says.
    """
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            prefix = f.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file; download it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER:
                raise CheckpointError(f"{path}: header of {length} bytes, at most {MAX_HEADER} are accepted")
            if length > size - 8:
                raise CheckpointError(
                    f"{path}: header says {length} bytes, the file has {size - 8} left; truncated, download it again"
                )
            raw = f.read(length)
    except OSError as e:
        raise CheckpointError(f"{path}: {cannot_read(e)}") from e
    return _parse(path, raw, 8 + length, size)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's entries, for ``object_pairs_hook``; ``ValueError`` for a key that is listed twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"{key!r} is listed twice")
            seen.add(key)
    return found


def _parse(path: Path, raw: bytes, start: int, size: int) -> list[Stored]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: header is not valid JSON: {str(e)[:200]}") from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is a JSON {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is not an object")
    tensors = [_entry(path, name, value, start) for name, value in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    at = start
    for t in tensors:
        if t.offset != at:
            kind = "overlaps the tensor before it" if t.offset < at else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {t.name}: offset {t.offset - start} {kind} (expected {at - start})")
        at += t.nbytes
    if at != size:
        what = "truncated, download it again" if at > size else "bytes after the last tensor"
        raise CheckpointError(f"{path}: {size} bytes, the header describes {at}; {what}")
    return tensors


def check_name(path: Path, name: str) -> None:
    """Refuse tensor names that look like a way out of a folder, and those a terminal or a header could not hold."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or not name.isprintable() or name == "__metadata__":
        raise CheckpointError(
            f"{path}: tensor name {brief(name)} is not acceptable (empty, path-like, reserved or not printable)"
        )


def _entry(path: Path, name: str, value: Any, start: int) -> Stored:
    def fail(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name[:200]}: {why}")

    check_name(path, name)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise fail("expected exactly dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = dtypes.BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise fail(f"unknown dtype {brief(code)}")

    def naturals(v: Any) -> bool:
        return isinstance(v, list) and all(type(i) is int and 0 <= i < 2**63 for i in v)

    if not naturals(shape) or len(shape) > 64:
        raise fail(f"shape {brief(shape)} is not a list of sizes")
    if not naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail(f"data_offsets {brief(offsets)} are not [begin, end]")
    nbytes = dtype.itemsize
    for s in shape:
        nbytes *= s
    if nbytes != offsets[1] - offsets[0]:
        given = offsets[1] - offsets[0]
        raise fail(f"shape {brief(shape)} of {dtype} needs {brief(nbytes)} bytes, data_offsets give {given}")
    return Stored(name, dtype, tuple(shape), path, start + offsets[0], nbytes)


def make_header(tensors: list[tuple[str, DType, tuple[int, ...]]]) -> tuple[bytes, dict[str, int], int]:
    """The bytes that begin a safetensors file of these tensors, stored in this order.

    Returns:
        The size field and header, padded with spaces so that the data begins at a multiple of 8; the absolute
        offset of each tensor; the size of the whole file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in tensors:
        nbytes = dtype.itemsize
        for s in shape:
            nbytes *= s
        header[name] = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    begin = 8 + len(raw)
    offsets = {name: begin + header[name]["data_offsets"][0] for name, _, _ in tensors}
    return struct.pack("<Q", len(raw)) + raw, offsets, begin + at
