"""From a model reference to a local folder: a path, or a repository id on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, NamedTuple

from seme.checkpoint.index import PICKLE, SAFETENSORS
from seme.errors import CheckpointError

TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")


class ModelRef(NamedTuple):
    """A model as the recipe names it: local path or repository id, a revision for the latter, and a LoRA adapter.

    ``label`` is its name in messages, where that is not the path.
    """

    path: str
    revision: str | None = None
    lora: ModelRef | None = None
    label: str | None = None

    def __str__(self) -> str:
        name = f"{self.path}@{self.revision}" if self.revision else self.label or self.path
        return f"{name}+{self.lora}" if self.lora is not None else name


def local_path(path: str) -> Path | None:
    """The file or folder of that name, ``~`` expanded; None if there is none."""
    try:
        local = Path(path).expanduser()
        return local if local.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL in it
        return None


def same_model(a: ModelRef, b: ModelRef) -> bool:
    """True for one reference, and for two spellings of one local path."""
    return a == b or identity(a) == identity(b)


def identity(ref: ModelRef) -> tuple[Any, ...]:
    """What references have in common that are the :func:`same_model`: a local path counts as the folder it leads to."""
    local = local_path(ref.path)
    place: Any = ref.path
    if local is not None:
        with contextlib.suppress(OSError):
            found = local.stat()
            place = found.st_dev, found.st_ino
    return place, ref.revision, None if ref.lora is None else identity(ref.lora)


def locate(ref: ModelRef) -> Path | None:
    """Where a model (without its adapter) is on this machine; None for one that only the hub can have. Asks nobody.

    Raises:
        CheckpointError: it can only be a local path, and nothing is there; or a local path is given a revision.
    """
    local = local_path(ref.path)
    if local is not None:
        if ref.revision is not None:
            raise CheckpointError(
                f"{ref}: {ref.path} is here, as a local path without revisions; "
                "leave the revision out, or run where no such path is to take the model from the hub"
            )
        return local
    remedy = "correct the path"
    parent, slash, rest = ref.path.partition("/")
    if ref.path.startswith((".", "/", "~")) or "/" in rest:
        raise CheckpointError(f"{ref.path}: no such file or folder{_here(ref.path)}; {remedy}")
    if slash and local_path(parent) is not None:
        remedy += f", or run where no {parent} is to take the model from the hub"
        raise CheckpointError(f"{ref.path}: no such file or folder{_here(ref.path)}, {parent} is there; {remedy}")
    return None


def _here(path: str) -> str:
    return "" if path.startswith(("/", "~")) else f" in {Path.cwd()}"


def resolve(ref: ModelRef, weights: bool = True) -> Path:
    """The local folder of a model, without its adapter; a hub repository is downloaded into the hub's cache if need be.

    Only the weights that :mod:`seme.checkpoint.index` would read are fetched, and none without ``weights``.
    ``HF_HUB_OFFLINE`` and the other variables of ``huggingface_hub`` apply.

    Raises:
        CheckpointError: neither a local path nor a repository that can be reached.
    """
    local = locate(ref)
    if local is not None:
        return local
    import huggingface_hub

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # its warnings say the same as the error, several times
    try:
        try:
            # One request, unlike a listing, which is tried again and again for half a minute.
            found = huggingface_hub.HfApi().model_info(ref.path, revision=ref.revision, timeout=TIMEOUT)
        except Exception as e:
            with contextlib.suppress(Exception):  # offline: what the cache holds
                patterns = [*_SMALL, *(("model*.safetensors", "adapter_model.safetensors") if weights else ())]
                cached = huggingface_hub.snapshot_download(
                    ref.path, revision=ref.revision, local_files_only=True, allow_patterns=patterns
                )
                return Path(cached)
            raise CheckpointError(f"{ref}: no such folder{_here(ref.path)}, and {_why(e)}") from e
        try:
            patterns = [*_SMALL, *(_weights([f.rfilename for f in found.siblings or ()]) if weights else ())]
            return Path(huggingface_hub.snapshot_download(ref.path, revision=ref.revision, allow_patterns=patterns))
        except Exception as e:
            raise CheckpointError(
                f"{ref}: the download failed: {_reason(e)}; run again, what is complete is kept"
            ) from e
    finally:
        log.setLevel(level)


def _weights(files: list[str]) -> list[str]:
    """The weight files to fetch, in the order in which :mod:`seme.checkpoint.index` looks for them.

    A repository may hold the same weights more than once, as ``consolidated.safetensors`` or in subfolders.
    """
    for single in (SAFETENSORS, PICKLE, "adapter_model.safetensors", "adapter_model.bin"):
        if single in files:
            return [single]
        if f"{single}.index.json" in files:
            suffix = Path(single).suffix
            return [f for f in files if f.endswith(suffix) and "/" not in f and not f.startswith("consolidated")]
    return []


def _why(e: Exception) -> str:
    """Why the hub gives no model, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(e, GatedRepoError):
        return "the hub gives the model only to who accepted its terms; accept them there and run 'hf auth login'"
    if isinstance(e, (RepositoryNotFoundError, HFValidationError)):
        return "the hub has no such model, or a private one; correct the path or the name, or run 'hf auth login'"
    if isinstance(e, RevisionNotFoundError):
        return "the hub has no such revision of the model; correct the revision"
    return f"the hub was not reached ({_reason(e)}); correct the path, or see to the network for a model of the hub"


def _reason(e: Exception) -> str:
    return " ".join(str(e).split())[:300] or type(e).__name__
