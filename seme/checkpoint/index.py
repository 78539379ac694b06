"""Which file of a checkpoint folder holds which tensor: single files, shards and their index."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seme.checkpoint.safetensors import MAX_HEADER, unique
from seme.errors import CheckpointError, brief, cannot_read

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
MAX_JSON = MAX_HEADER
"""Bytes of a JSON file that are accepted; the largest tokenizers have a third of it."""


def read_json(path: Path, **options: Any) -> dict[str, Any]:
    """A JSON object from a file; ``CheckpointError`` naming the file if it is not one. Options as ``json.loads``."""
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            if size > MAX_JSON:
                raise CheckpointError(f"{path}: {size} bytes, at most {MAX_JSON} are accepted; download it again")
            raw = f.read(size)
        with _uncollected():
            value = json.loads(raw.decode("utf-8"), **options)
    except OSError as e:
        raise CheckpointError(f"{path}: {cannot_read(e)}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not valid JSON: {str(e)[:200]}; download it again") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON {type(value).__name__}, expected an object; download it again")
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that a file can hold; what is not ASCII is escaped only if something in it is no text (half a surrogate)."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    return text + "\n"


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which finds nothing in JSON and takes as long as reading that of a tokenizer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a checkpoint and, for shards, the index's map from tensor to file name.

    Searched in the order of mergekit and transformers: ``model.safetensors``, its index,
    ``pytorch_model.bin``, its index.

    Raises:
        CheckpointError: the folder cannot be read, has no weights, lacks a shard, or its index points out of it.
    """
    try:
        names = os.listdir(folder)
    except OSError as e:
        raise CheckpointError(f"{folder}: {cannot_read(e)}") from e
    for single in (SAFETENSORS, PICKLE):
        for name in (single, f"{single}.index.json"):
            if name in names:
                if not os.path.isfile(folder / name):  # reading a pipe would never end
                    raise CheckpointError(f"{folder / name}: not a file, or a link to none; download it again")
                return ([folder / name], None) if name == single else _shards(folder / name)
    hint = "; name the folder that holds them"
    if "adapter_model.safetensors" in names or "adapter_config.json" in names:
        hint = "; this is a LoRA adapter: write it after its model, MODEL+ADAPTER"
    elif any(name.endswith(".gguf") for name in names):
        hint = "; GGUF files are quantised: use the original checkpoint"
    raise CheckpointError(f"{folder}: no {SAFETENSORS} or {PICKLE}, nor an index of shards{hint}")


def _shards(index: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json(index, object_pairs_hook=unique).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it; download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise CheckpointError(f"{index}: tensor {brief(name)}: file {brief(file)} is not a name in the folder")
    files = [index.parent / file for file in sorted(set(weight_map.values()))]
    for path in files:
        if not os.path.isfile(path):  # unlike Path's, never raises, whatever the name
            raise CheckpointError(f"{path}: missing shard, listed in {index.name}; download it again")
    return files, weight_map
