"""From a model reference to a local folder: a path, or a repository id on the Hugging Face hub."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from seme.errors import CheckpointError

_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")


class ModelRef(NamedTuple):
    """A model as the recipe names it: local path or repository id, and a revision for the latter."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


def local_path(path: str) -> Path | None:
    """The file or folder of that name, ``~`` expanded; None if there is none."""
    try:
        local = Path(path).expanduser()
        return local if local.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL in it
        return None


def resolve(ref: ModelRef) -> Path:
    """The local folder of a model; a hub repository is downloaded into the hub's cache if need be.

    Only safetensors are fetched when the repository has any, else ``.bin`` files. ``HF_HUB_OFFLINE`` and the
    other variables of ``huggingface_hub`` apply.

    Raises:
        CheckpointError: neither a local path nor a repository that can be reached.
    """
    local = local_path(ref.path)
    if local is not None:
        return local
    if ref.path.count("/") > 1 or ref.path.startswith((".", "/", "~")):
        raise CheckpointError(f"{ref.path}: no such file or folder")
    import huggingface_hub

    try:
        try:
            files = huggingface_hub.HfApi().list_repo_files(ref.path, revision=ref.revision)
        except Exception:
            with contextlib.suppress(Exception):  # offline: what the cache holds
                return Path(huggingface_hub.snapshot_download(ref.path, revision=ref.revision, local_files_only=True))
            raise
        weights = "*.safetensors" if any(f.endswith(".safetensors") for f in files) else "*.bin"
        return Path(
            huggingface_hub.snapshot_download(ref.path, revision=ref.revision, allow_patterns=[*_SMALL, weights])
        )
    except Exception as e:
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        raise CheckpointError(f"{ref}: neither a local folder nor a model the hub gives: {reason}") from e
