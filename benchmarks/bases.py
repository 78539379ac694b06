"""Semantic bases of a large head: time against ``torch.linalg.pinv``, errors of both against float64.

``python -m benchmarks.bases`` makes a head with random entries, a decaying spectrum and a mean that all rows share, as
trained heads have, takes its bases both ways in float32, and compares them with the bases in float64.

Two times of ours: the inverse of the Gram matrix, which is computed once and kept, and which every tile of bases is one
product with; and all unit bases written to memory, which is what pinv gives (not normalised). pinv cuts singular values
at ``max(v, d) * eps`` of the largest; those of the head made here are all above.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, Results, provenance, summarize, table
from seme import SemanticBases

ABOUT = {
    "seconds": "per engine: seme (all unit bases), inverse (of it: the d x d matrix), product (a float32 matrix "
    "product of 2 v d^2 operations, for scale), pinv (torch.linalg.pinv of the same matrix)",
    "ratio": "median of pinv / median of seme, and of its first part, the inverse",
    "gflops": "of a float32 product and of a float64 product here, in the same run",
    "error": "per engine: largest and root mean square over the labels of |s - s64| / |s64|, s64 in float64",
    "law": "largest entry of |W^T S - 1| of the bases in float64, which says how good the reference is",
    "condition": "of the head",
    "load": "load of the machine, one minute, before and after",
}


def make_head(v: int, d: int, seed: int = 0) -> torch.Tensor:
    """Rows of a normal distribution with the spectrum ``i^-0.35`` in random directions, plus a common mean."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    scale = torch.arange(1, d + 1) ** -0.35
    head = torch.randn(v, d, generator=generator).mul_(scale) @ rotation
    return head.add_(0.7 * float(scale.norm()) * rotation[d // 2])


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of one call, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def gflops(d: int, dtype: torch.dtype) -> float:
    """Rate of a square matrix product, best of three."""
    a = torch.randn(d, d, dtype=dtype)
    return 2e-9 * d**3 / min(seconds(lambda: a @ a)[0] for _ in range(3))


def errors(found: torch.Tensor, head: torch.Tensor, inverse: torch.Tensor, normalized: bool) -> dict[str, float]:
    """Distances of bases [v, d] from those in float64, relative per label."""
    parts = []
    for rows, bases in zip(head.split(2048), found.split(2048), strict=True):
        exact = rows.double() @ inverse
        if normalized:
            exact /= exact.norm(dim=1, keepdim=True)
        parts.append((bases.double() - exact).norm(dim=1) / exact.norm(dim=1))
    each = torch.cat(parts)
    return {"max": float(each.max()), "rms": float(each.square().mean().sqrt())}


def measure(v: int, d: int, rounds: int, peer: bool) -> dict[str, Any]:
    """One size; an entry of the results file."""
    head = make_head(v, d)
    load = [os.getloadavg()[0]]
    samples: dict[str, list[float]] = {"seme": [], "inverse": [], "product": []}
    units = torch.empty(0)
    square = torch.randn(d, d)
    for _ in range(rounds):

        def ours() -> tuple[SemanticBases, torch.Tensor]:
            bases = SemanticBases.from_head(head)
            return bases, bases.matrix()

        took, (bases, units) = seconds(ours)
        samples["seme"].append(took)
        samples["inverse"].append(bases.seconds)
        samples["product"].append(seconds(lambda: head @ square)[0])
        print(f"{v} x {d}: seme {took:.2f} s, product {samples['product'][-1]:.2f} s", flush=True)
    gram = head.double().T @ head.double()
    exact = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    law = float((gram @ exact - torch.eye(d, dtype=torch.float64)).abs().max())
    error = {"seme": errors(units, head, exact, normalized=True)}
    del gram, units
    if peer:
        took, found = seconds(lambda: torch.linalg.pinv(head))
        samples["pinv"] = [took]
        error["pinv"] = errors(found.T, head, exact, normalized=False)
        print(f"{v} x {d}: pinv {took:.2f} s", flush=True)
    load.append(os.getloadavg()[0])
    stats = {name: summarize(times) for name, times in samples.items()}
    return {
        "v": v,
        "d": d,
        "threads": torch.get_num_threads(),
        "seconds": stats,
        "ratio": {k: stats["pinv"]["median"] / stats[k]["median"] for k in ("inverse", "seme")} if peer else None,
        "gflops": {"float32": gflops(d, torch.float32), "float64": gflops(d, torch.float64)},
        "error": error,
        "law": law,
        "condition": bases.condition**0.5,
        "load": load,
        "samples": samples,
    }


def report(entries: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of entries of the results file."""
    rows = []
    for name, e in entries.items():
        times, error = e["seconds"], e["error"]
        row = [f"{name} (condition {e['condition']:.0f})"]
        row += [f"{times[k]['median']:.1f} s" if k in times else "-" for k in ("product", "inverse", "seme", "pinv")]
        row += [f"{e['ratio'][k]:.1f}x" if e["ratio"] else "-" for k in ("inverse", "seme")]
        rows.append(row + [f"{error[k]['max']:.1e}" if k in error else "-" for k in ("seme", "pinv")])
    header = ["head", "one product", "inverse", "all bases", "pinv", "faster: inverse", "all", "error", "error of pinv"]
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bases", description="time the bases of a large head")
    parser.add_argument("--sizes", nargs="+", default=["32000x4096"], metavar="VxD")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="without pinv, which takes minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "bases-cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = Results(options.out, provenance(), ABOUT)
    chosen = {}
    for size in options.sizes:
        v, d = map(int, size.split("x"))
        chosen[size] = measure(v, d, options.rounds, not options.no_peer)
        results.put(size, chosen[size])
    print(report(chosen))


if __name__ == "__main__":
    main()
