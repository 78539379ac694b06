"""What was computed from a head, kept on disk under the hash of its content.

The folder is ``$SEME_CACHE/bases``, by default ``~/.cache/seme/bases``; it can be removed at any time. An entry is a
safetensors file that carries a checksum of all that is in it. One that does not match is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FORMAT = "2"
"""To be changed whenever the meaning of entries or the way they are computed does."""

ABOUT = "seme"
"""The entry of the metadata; a single one, because the library writes several in any order."""


def folder() -> Path:
    """Where entries are."""
    root = os.environ.get("SEME_CACHE")
    return (Path(root).expanduser() if root else Path("~/.cache/seme").expanduser()) / "bases"


def path(key: str, kind: str) -> Path:
    """The file of one entry."""
    return folder() / f"{key}.{kind}.safetensors"


def load(key: str, kind: str, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, torch.Tensor], str] | None:
    """The tensors (float64) and the note kept for a key; None if there are none that can be trusted."""
    import torch
    from safetensors import safe_open

    try:
        with safe_open(path(key, kind), framework="pt") as f:
            about = json.loads(f.metadata()[ABOUT])
            note, checksum = about["note"], about["checksum"]
            tensors = {name: f.get_tensor(name).clone() for name in shapes}
    except Exception:  # missing, truncated, not a safetensors file, without one of the tensors: all the same
        return None
    if any(tuple(t.shape) != shapes[name] or t.dtype != torch.float64 for name, t in tensors.items()):
        return None
    return (tensors, note) if checksum == _checksum(key, kind, tensors, note) else None


def store(key: str, kind: str, tensors: dict[str, torch.Tensor], note: str) -> bool:
    """Keep tensors (float64, on the CPU) and a note; False if the folder cannot be written to.

    The file appears complete or not at all.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {"note": note, "checksum": _checksum(key, kind, tensors, note)}
    target = path(key, kind)
    part = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        number, part = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(number)
        save_file(tensors, part, metadata={ABOUT: json.dumps(about)})
        os.replace(part, target)
    except (OSError, SafetensorError):  # no folder, no space: the bases are there, they are only not kept
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)
        return False
    return True


def _checksum(key: str, kind: str, tensors: dict[str, torch.Tensor], note: str) -> str:
    shapes = {name: list(t.shape) for name, t in sorted(tensors.items())}
    found = hashlib.blake2b(json.dumps([FORMAT, key, kind, note, shapes]).encode(), digest_size=32)
    for name in sorted(tensors):
        found.update(tensors[name].contiguous().view(-1).numpy().data)
    return found.hexdigest()
