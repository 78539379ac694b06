"""The semantic bases of a model in numbers, and how well they resolve what the model writes (``seme bases``)."""

from __future__ import annotations

import time
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seme.semantics.bases import SemanticBases
from seme.semantics.head import read_rows
from seme.semantics.resolve import round_trip

if TYPE_CHECKING:
    import torch

    from seme.checkpoint import Checkpoint, Stored
    from seme.roles import TensorRole

SAMPLE = 64
"""Latent vectors taken of each tensor."""


def collect(path: str | Path, *, fold_norm: bool = True, device: str = "cpu") -> dict[str, Any]:
    """Compute the bases of a model, or find them in the cache, and measure them.

    The diagnostic is the cosine between a latent vector and its resolution in mode ``cosine``. No data is needed: the
    vectors are directions that the model's own weights have in the latent space, :data:`SAMPLE` of each tensor. Those
    of a layer are what it writes into the stream, the columns of its attention output and MLP down projections.

    Returns:
        ``model``, ``head``, ``gain_folded``, ``labels`` (v), ``width`` (d), ``rank``, ``condition`` (of the Gram
        matrix), ``method``, ``source`` (``computed`` or ``cache``), ``seconds`` (``bases``: the inverse of the Gram
        matrix; ``frame``: norms and frame operator), ``file`` (in the cache, or None), ``norms`` (least above zero and
        greatest), ``zero_labels`` (their number, and the text of the first few) and ``round_trip``: ``random``,
        ``head``, ``embedding`` (None if tied) and ``layers`` (name -> figures), figures being ``mean`` and ``min``.

    Raises:
        CheckpointError: not a model, or no head in it.
        BackendError: the device is not there.
    """
    import torch

    from seme.checkpoint import Checkpoint, ModelRef, resolve
    from seme.roles import Role, latent, layer, roles

    folder = resolve(ModelRef(str(path)))
    bases = SemanticBases.from_checkpoint(folder, fold_norm=fold_norm, device=device)
    started = time.perf_counter()
    norms, zeros = bases.norms, bases.zero_rows
    seconds = {"bases": bases.seconds, "frame": time.perf_counter() - started}

    def figures(vectors: torch.Tensor) -> dict[str, float]:
        found = round_trip(vectors, bases)
        found = found[vectors.to(found.device).any(-1)]  # zero vectors have no direction
        return {"mean": float(found.mean()), "min": float(found.min())} if len(found) else {"mean": 0.0, "min": 0.0}

    written: dict[str, list[torch.Tensor]] = {}
    with Checkpoint(folder) as checkpoint:
        shapes = {name: t.shape for name, t in checkpoint.tensors.items()}
        space = latent(checkpoint.config, shapes)
        embedding = None
        for name, role in roles(checkpoint.config, shapes).items():
            stored, place = checkpoint.tensors[name], layer(name)
            if not stored.dtype.mergeable or 0 in stored.shape:
                continue
            if role.role is Role.WRITES and place is not None:
                written.setdefault(f"{place[0]}.{place[1]}", []).append(_columns(checkpoint, stored, role))
            elif role.role is Role.VOCABULARY and role.latent_axis == "in" and name != space.head and embedding is None:
                embedding = _spread(checkpoint, stored)
    random = torch.randn((SAMPLE, bases.width), generator=torch.Generator().manual_seed(0))
    rows = torch.linspace(0, bases.size - 1, SAMPLE).long()
    return {
        "model": str(path),
        "head": space.head,
        "gain_folded": space.final_norm if bases.head.gain is not None else None,
        "labels": bases.size,
        "width": bases.width,
        "rank": bases.rank,
        "condition": bases.condition,
        "method": bases.method,
        "source": bases.source,
        "seconds": seconds,
        "file": str(bases.stored) if bases.stored else None,
        "norms": [float(norms[norms > 0].min()), float(norms.max())],
        "zero_labels": {"count": len(zeros), "first": [bases.labels[int(i)] for i in zeros[:8]]},
        "round_trip": {
            "random": figures(random),
            "head": figures(bases.rows(rows)),
            "embedding": None if embedding is None else figures(embedding),
            "layers": {name: figures(torch.cat(vectors)) for name, vectors in written.items()},
        },
    }


def _spread(checkpoint: Checkpoint, stored: Stored) -> torch.Tensor:
    """Rows of an embedding, evenly spread over the labels; [n, d] float32."""
    import torch

    return read_rows(checkpoint, stored, torch.linspace(0, stored.shape[0] - 1, SAMPLE).long()).float()


def _columns(checkpoint: Checkpoint, stored: Stored, role: TensorRole) -> torch.Tensor:
    """Vectors that a matrix writes into the stream, in four runs of neighbours (a run may lie in one attention head).

    They are the columns of [out, in]; stored the other way round, they are rows of the file. Of stacked experts, those
    of the first one. Returns [n, d] float32.
    """
    import torch

    shape = stored.shape[role.batch :]
    first = stored._replace(shape=shape, nbytes=prod(shape) * stored.dtype.itemsize)
    out, count = (shape[1], shape[0]) if role.transposed else (shape[0], prod(shape[1:]))
    run = min(SAMPLE // 4, count)
    runs = [slice(start, start + run) for start in sorted({(count - run) * i // 3 for i in range(4)})]
    if role.transposed:
        return torch.cat([read_rows(checkpoint, first, part).float() for part in runs])
    return torch.cat([read_rows(checkpoint, first, slice(0, out), part).float().T for part in runs])


def as_text(found: dict[str, Any]) -> str:
    """:func:`collect`'s result for people."""
    v, d, zeros = found["labels"], found["width"], found["zero_labels"]
    gain = f" times {found['gain_folded']}" if found["gain_folded"] else ", no gain folded in"
    how = {"cholesky": "Cholesky", "eigh": "eigenvectors, small ones cut"}[found["method"]]
    seconds, kept = found["seconds"], found["file"] or "not kept, the cache folder cannot be written to"
    kept = f"found in {kept}" if found["source"] == "cache" else f"cache: {kept}"
    lines = [
        f"{'model':<12} {found['model']}",
        f"{'head':<12} {found['head']}{gain}",
        f"{'bases':<12} {v} labels in {d} dimensions, v/d = {v / d:.1f}",
        f"{'rank':<12} {found['rank']} of {d} ({how})",
        f"{'condition':<12} {found['condition']:.3g} (of Wg^T Wg; of the head {found['condition'] ** 0.5:.3g})",
        f"{'norms':<12} {found['norms'][0]:.3g} to {found['norms'][1]:.3g}",
    ]
    if zeros["count"]:
        names = ", ".join(repr(label) for label in zeros["first"])
        lines.append(f"{'zero rows':<12} {zeros['count']}: {names}{', ...' if zeros['count'] > 8 else ''}")
    lines += [
        f"{'time':<12} {seconds['bases']:.2f} s, norms and frame operator {seconds['frame']:.2f} s ({kept})",
        "",
        f"cosine of vectors with their resolution (dual and logit: 1)  {'mean':>6} {'least':>6}",
    ]
    trip = found["round_trip"]
    titles = {"random": "random directions", "head": "rows of the head", "embedding": "rows of the embedding"}
    rows = {text: trip[key] for key, text in titles.items() if trip[key] is not None}
    rows |= {f"written by {name}": figures for name, figures in trip["layers"].items()}
    lines += [f"  {name:<57}  {row['mean']:>6.3f} {row['min']:>6.3f}" for name, row in rows.items()]
    return "\n".join(lines)
