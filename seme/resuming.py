"""Going on with a merge that was killed or stopped: is it the same merge, and are its inputs as they were?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from seme import __version__
from seme.engine import Options
from seme.errors import CheckpointError, cannot_read
from seme.plan import Plan
from seme.runtime import Place
from seme.sizes import format_size

NUMERICS = 1
"""Raised whenever a version gives other bytes for a recipe than the one before it: their halves do not fit together."""


def identity(plan: Plan, options: Options, place: Place, copied: Sequence[Path]) -> dict[str, Any]:
    """What the bytes of a merge depend on, as JSON.

    Args:
        plan: the merge.
        options: of which ``nonfinite`` counts, and for matrix methods threads and memory.
        place: where it runs; counts for matrix methods, whose sums are in the order of the device's libraries.
        copied: files that the output takes over as they are.
    """
    recipe = [(f.name, getattr(plan.config, f.name)) for f in fields(plan.config) if f.name != "source"]
    checkpoints = [c for m in plan.models for c in (m.checkpoint, m.adapter) if c is not None]
    weights = {file for c in checkpoints for file in c.files}
    others = {file for c in checkpoints for file in (c.path / "config.json",) if file.is_file()}
    others.update(file for file in copied if file.is_file())
    return {
        "seme": __version__,
        "numerics": NUMERICS,
        "recipe": _digest(repr(recipe).encode()),
        "layout": _digest(b"".join(plan.layout.headers)),
        "nonfinite": options.nonfinite,
        "place": _place(options, place) if plan.method.matrix else "",
        "inputs": {str(f.resolve()): _state(f, f in weights) for f in sorted(weights | others)},
    }


def _place(options: Options, place: Place) -> str:
    memory = format_size(options.buffers(place))
    return f"backend {place.backend}, device {place.device}, --threads {options.threads}, --memory {memory}"


def difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str | None:
    """Why a merge with identity ``now`` cannot go on with one with ``then``; None if it can."""
    if then.get("numerics") != now["numerics"]:
        return f"seme {then.get('seme')} computed other values than seme {now['seme']}"
    if then.get("recipe") != now["recipe"]:
        return "the recipe is another one, or --seed or --compat"
    if then.get("nonfinite") != now["nonfinite"]:
        return f"it ran with --nonfinite {then.get('nonfinite')}"
    if then.get("place") != now["place"]:
        return f"it ran on {then.get('place')}, now it would on {now['place']}, where products have other last bits"
    before = then.get("inputs")
    changed = _changed(before if isinstance(before, dict) else {}, now["inputs"])
    if changed is not None:
        return changed
    return "it has other tensors or shards (--out-shard-size)" if then.get("layout") != now["layout"] else None


def check_unchanged(made_of: Mapping[str, Any]) -> None:
    """Notice inputs that were changed while they were merged.

    Raises:
        CheckpointError: one is another file now, or cannot be read; the output would be of no model there ever was.
    """
    for name, before in made_of["inputs"].items():
        changed = _changed({name: before}, {name: _state(Path(name), bool(before[2]))})
        if changed is not None:
            raise CheckpointError(f"{changed}; it changed while it was merged, so nothing was written; merge again")


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    for name in {**then, **now}:
        a, b = then.get(name), now.get(name)
        if a is None or b is None:
            return f"{name}: {'was' if b is None else 'was not'} among its inputs"
        for what, x, y in zip(("size", "time of last change (ns)", "header"), a, b):
            if x != y:
                return f"{name}: its {what} was {x} and is {y}"
    return None


def _state(file: Path, weights: bool) -> list[Any]:
    """Size, time of the last change, and of a file of weights a hash of its header."""
    try:
        found = os.stat(file)
        return [found.st_size, found.st_mtime_ns, _header(file) if weights else ""]
    except OSError as e:
        raise CheckpointError(f"{file}: {cannot_read(e)}", fault=True) from e


def _header(file: Path) -> str:
    with open(file, "rb") as f:
        prefix = f.read(8)
        length = int.from_bytes(prefix, "little") if file.suffix == ".safetensors" else 4096
        return _digest(prefix + f.read(min(length, 1 << 27)))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
