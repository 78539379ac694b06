"""The ops with matrix products: against the plain product of the same flops, and against unfused torch.

``python -m benchmarks.matrix`` measures them on the CPU, and four whole things beside their peers: rule ``project`` on
one matrix beside the singular value decompositions that TSV-M needs, the selection of ``resolve`` beside a flat
inner-product search of faiss, and all of ``resolve`` beside a product, topk and least squares row by row.
``benchmarks.gpu.matrix`` runs the same cases on a GPU.

A case is a call on matrices of a 7 B model: a square projection of 4096, 32 000 labels. ``of_product`` is what counts;
1 would be a kernel that costs no more than the plain product in it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import seme
from benchmarks.common import MIB, RESULTS, Results, in_turns, provenance, seconds, summarize, table
from seme.ops._registry import MATRIX_OPS
from seme.ops.resolve import nearest

ABOUT = {
    "flops": "multiplications and additions of the op's definition; half of a plain product for symmetric results",
    "product": "[m, k, n] and dtype of the product of as many flops (torch.mm) that is timed in the same rounds",
    "gflops": "flops / median seconds / 1e9, by provider: product, seme, torch (one operation after the other)",
    "of_product": "median rate of a provider / median rate of the product",
    "torch_over_seme": "median seconds of unfused torch / median seconds of seme",
    "peak_mib": "memory that a call takes beyond its operands at its peak, its results included: growth of the "
    "process's resident set",
    "ratios": "of the whole things: median seconds of a peer / median seconds of seme",
}

ETAS = (0.4, 0.35, 0.25)
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        op: name of the op.
        product: m, k, n of a product of as many flops.
        dtype: of the product: that of the operands on the tensor cores, or float32.
        seme: ``seme(backend=...)``.
        torch: the same, one operation of plain torch after the other.
    """

    op: str
    product: tuple[int, int, int]
    dtype: torch.dtype
    seme: Callable[..., Any]
    torch: Callable[[], Any]

    @property
    def flops(self) -> int:
        """Of the op, and of the product."""
        m, k, n = self.product
        return 2 * m * k * n


@dataclass(frozen=True)
class Sizes:
    """Shapes of all cases.

    Attributes:
        rows: of the weights.
        few: rows of weights and latent vectors in the cases whose flops grow with the labels as well.
        width: columns of the weights, width of the latent space.
        labels: of the vocabulary.
        low: dtype of a product of weights: bfloat16 on tensor cores, float32 on a CPU.
    """

    rows: int
    few: int
    width: int
    labels: int
    low: torch.dtype

    def products(self) -> dict[str, tuple[str, tuple[int, int, int], torch.dtype]]:
        """Op, product of as many flops and its dtype, of every case."""
        r, few, d, v = self.rows, self.few, self.width, self.labels
        return {
            "delta_gram": ("delta_gram", (d, r // 2, d), self.low),
            "delta_project": ("delta_project", (r, d, d), self.low),
            "project_erase 1+3": ("project_erase", (r, 3 * d, d), self.low),
            f"elect_select 1+3, {few} rows": ("elect_select", (few, 3 * d, v), self.low),
            f"elect 1+3, {few} rows": ("elect", (few, 4 * d, v), self.low),
            "semantic_energy": ("semantic_energy", (v, d, d), torch.float32),
            "weighted_gram, a tenth": ("weighted_gram", (d, v // 20, d), torch.float32),
            f"resolve 8 labels, {few} vectors": ("resolve", (few, d, v), torch.float32),
        }


def cases(models: Tensors, sizes: Sizes) -> dict[str, Case]:
    """All cases on the weights of a base, and three fine-tunes of it."""
    base, *experts = models
    labels, width, device = sizes.labels, sizes.width, base.device
    gen = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, device=device)

    bases = torch.nn.functional.normalize(normal(labels, width), dim=1)
    dual = bases / (labels / width)
    moments = [m @ m.T / width for m in (normal(width, width) / width**0.5 for _ in experts)]
    weights = normal(labels).abs_() * (torch.rand(labels, generator=gen, device=device) < 0.1)
    vectors = normal(sizes.few, width)
    few = (base[: sizes.few], [e[: sizes.few] for e in experts])
    threshold = int(torch.tensor(1e-5).view(torch.int32))
    operands: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "delta_gram": ((base, experts[0]), {}),
        "delta_project": ((base, experts[0], moments[0]), {}),
        "project_erase": ((base, experts, moments), {"scale": 1.0}),
        "elect_select": ((*few, bases), {"lowest": 0, "shift": 15}),
        "elect": ((*few, bases, dual), {"threshold": threshold, "etas": list(ETAS)}),
        "semantic_energy": ((bases, moments[0]), {}),
        "weighted_gram": ((bases, weights), {}),
        "resolve": ((vectors, bases), {"k": 8}),
    }

    def call(name: str) -> Callable[..., Any]:
        given, arguments = operands[name]
        return lambda **options: MATRIX_OPS[name](*given, **arguments, **options)

    def unfused(name: str) -> Callable[[], Any]:
        given, _ = operands[name]
        if name in ("semantic_energy", "weighted_gram", "resolve"):
            return lambda: UNFUSED[name](*given)
        return lambda: UNFUSED[name](*given, low=sizes.low)

    return {
        key: Case(name, product, dtype, call(name), unfused(name))
        for key, (name, product, dtype) in sizes.products().items()
    }


# Plain torch, as one would write it; products of weights in ``low``, those of bases in float32.


def torch_delta(tensor: torch.Tensor, base: torch.Tensor, low: torch.dtype) -> torch.Tensor:
    """A task vector."""
    return tensor.to(low) - base.to(low)


def torch_delta_gram(base: torch.Tensor, tensor: torch.Tensor, low: torch.dtype) -> torch.Tensor:
    """T^T T."""
    delta = torch_delta(tensor, base, low)
    return (delta.T @ delta).float()


def torch_delta_project(
    base: torch.Tensor, tensor: torch.Tensor, matrix: torch.Tensor, low: torch.dtype
) -> torch.Tensor:
    """T M."""
    return (torch_delta(tensor, base, low) @ matrix.to(low)).float()


def torch_project_erase(base: torch.Tensor, tensors: Tensors, projections: Tensors, low: torch.dtype) -> torch.Tensor:
    """W_0 + sum_m T_m P_m."""
    merged = base.float()
    for tensor, projection in zip(tensors, projections, strict=True):
        merged += torch_delta(tensor, base, low) @ projection.to(low)
    return merged.to(base.dtype)


def torch_coordinates(base: torch.Tensor, tensors: Tensors, bases: torch.Tensor, low: torch.dtype) -> Tensors:
    """T_m S^T of all experts."""
    rounded = bases.to(low)
    return [(torch_delta(t, base, low) @ rounded.T).float() for t in tensors]


def torch_elect_select(
    base: torch.Tensor, tensors: Tensors, bases: torch.Tensor, low: torch.dtype
) -> tuple[torch.Tensor, Tensors]:
    """Histogram of the variances, and energies per bin."""
    z = torch_coordinates(base, tensors, bases, low)
    bins = (torch.stack(z).var(0, correction=0).view(torch.int32) >> 15).flatten()
    return torch.bincount(bins, minlength=65537), [torch.bincount(bins, x.flatten().square(), 65537) for x in z]


def torch_elect(
    base: torch.Tensor, tensors: Tensors, bases: torch.Tensor, dual: torch.Tensor, low: torch.dtype
) -> torch.Tensor:
    """Select, elect, mean of those that agree, recompose."""
    z = torch.stack(torch_coordinates(base, tensors, bases, low))
    etas = torch.tensor(ETAS, device=base.device)[:, None, None]
    agree = (z * torch.where(z.sum(0) >= 0, 1.0, -1.0) > 0) * etas
    share = agree.sum(0)
    combined = (agree * z).sum(0).div_(share.masked_fill_(share == 0, 1.0))
    combined *= z.var(0, correction=0) >= 1e-5
    return (base + combined.to(low) @ dual.to(low)).to(base.dtype)


def torch_semantic_energy(bases: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """s_i^T M s_i."""
    return ((bases @ moment) * bases).sum(1)


def torch_weighted_gram(bases: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """S^T diag(w) S of the rows with a weight."""
    kept = weights.nonzero()[:, 0]
    rows = bases[kept]
    return rows.T @ (weights[kept, None] * rows)


def torch_resolve(vectors: torch.Tensor, bases: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, topk, batched least squares, 512 vectors at a time."""
    found = []
    for part in vectors.split(512):
        labels = (part @ bases.T).abs().topk(8).indices
        atoms = bases[labels]
        gram = atoms @ atoms.mT
        solution = torch.linalg.solve(gram, (atoms @ part[:, :, None]))
        found.append((labels, solution[:, :, 0], part - (atoms.mT @ solution)[:, :, 0]))
    labels, coefficients, residual = zip(*found)
    return torch.cat(labels), torch.cat(coefficients), torch.cat(residual)


UNFUSED: dict[str, Callable[..., Any]] = {
    "delta_gram": torch_delta_gram,
    "delta_project": torch_delta_project,
    "project_erase": torch_project_erase,
    "elect_select": torch_elect_select,
    "elect": torch_elect,
    "semantic_energy": torch_semantic_energy,
    "weighted_gram": torch_weighted_gram,
    "resolve": torch_resolve,
}


# On the CPU.

WIDTH, LABELS, FEW = 4096, 32000, 512


def make_models(rows: int, width: int, experts: int = 3) -> Tensors:
    """A base and fine-tunes of it, bfloat16, [rows, width]."""
    gen = torch.Generator().manual_seed(0)
    base = torch.randn(rows, width, generator=gen).mul_(0.02)
    tuned = [base + torch.randn(rows, width, generator=gen).mul_(2e-3) for _ in range(experts)]
    return [t.bfloat16() for t in (base, *tuned)]


def resident(field: str) -> int:
    """Bytes: VmRSS (now) or VmHWM (peak) of this process."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak(call: Callable[[], object]) -> float:
    """MiB that the resident set grows by during a call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again without showing
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = resident("VmRSS")
    result = call()
    grown = resident("VmHWM") - before
    del result
    return round(max(grown, 0) / MIB, 1)


def verify(case: Case, small: Case) -> None:
    """The kernel gives what the reference gives, on a small case: no number without a right result."""
    found, wanted = small.seme(backend="cpu"), small.seme(backend="torch")
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, wanted)), strict=True):
        distance = float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))
        if distance > 1e-2:  # bfloat16 results round apart; a wrong formula is off by far more
            raise AssertionError(f"{case.op}: off by {distance:.1e} from the reference")


def measure(case: Case, rounds: int, threads: int) -> dict[str, Any]:
    """Product, seme and unfused torch; an entry of the results file."""
    m, k, n = case.product
    left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    calls: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(left, right, out=out),
        "seme": lambda: case.seme(backend="cpu", threads=threads),
        "torch": case.torch,
    }
    stats, samples = in_turns(calls, rounds)
    speed = {name: case.flops / stats[name]["median"] / 1e9 for name in stats}
    return {
        "flops": case.flops,
        "product": [*case.product, "float32"],
        "threads": threads,
        "seconds": stats,
        "gflops": speed,
        "of_product": {name: speed[name] / speed["product"] for name in ("seme", "torch")},
        "torch_over_seme": stats["torch"]["median"] / stats["seme"]["median"],
        "peak_mib": {name: peak(calls[name]) for name in ("seme", "torch")},
        "samples": samples,
    }


def project_flops(rows: int, width: int, experts: int) -> int:
    """Of rule ``project`` without flattening: n Gram matrices, n - 1 products, one Cholesky factor and solve."""
    return (experts + 2 * (experts - 1) + 2) * rows * width**2 + width**3 // 3


def measure_project(models: Tensors, rounds: int, threads: int, peer: bool) -> dict[str, Any]:
    """Rule ``project`` of one matrix, from weights to weights, with and without flattening; TSV-M of the same."""
    rows, width = models[0].shape
    flops = project_flops(rows, width, len(models) - 1)
    k = flops // (2 * rows * width)
    left, right = torch.randn(rows, k), torch.randn(k, width)
    states = [{"model.layers.0.mlp.up_proj.weight": t} for t in models]

    def merge(method: str, **parameters: Any) -> Callable[[], object]:
        return lambda: seme.merge_state_dicts(states, method, base=0, parameters=parameters, threads=threads)

    plain, flattened = merge("seme", flatten=0.0), merge("seme")
    calls = {"product": lambda: left @ right, "seme, not flattened": plain, "seme": flattened}
    stats, samples = in_turns(calls, rounds)
    if peer:
        samples["TSV-M"] = [round(seconds(merge("tsv_m")), 3)]
        stats["TSV-M"] = summarize(samples["TSV-M"])
    return {
        "flops": flops,
        "product": [rows, k, width, "float32"],
        "threads": threads,
        "seconds": stats,
        "of_product": {"seme, not flattened": stats["product"]["median"] / stats["seme, not flattened"]["median"]},
        "ratios": {
            f"{other} / {own}": stats[other]["median"] / stats[own]["median"]
            for other in ("TSV-M",)
            for own in ("seme", "seme, not flattened")
            if other in stats
        },
        "peak_mib": {name: peak(calls[name]) for name in ("seme, not flattened", "seme")},
        "samples": samples,
    }


def torch_least_squares(vectors: torch.Tensor, bases: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, topk, ``torch.linalg.lstsq`` of each row's own bases; 512 vectors at a time."""
    found = []
    for part in vectors.split(512):
        labels = (part @ bases.T).abs().topk(k).indices
        found.append((labels, torch.linalg.lstsq(bases[labels].mT, part[:, :, None]).solution[:, :, 0]))
    labels, coefficients = zip(*found)
    return torch.cat(labels), torch.cat(coefficients)


def measure_resolve(vectors: int, width: int, labels: int, k: int, rounds: int, threads: int) -> dict[str, Any]:
    """All of ``resolve`` beside a loop in torch, and its selection beside faiss's flat search."""
    import faiss

    gen = torch.Generator().manual_seed(0)
    bases = torch.nn.functional.normalize(torch.randn(labels, width, generator=gen), dim=1)
    queries = torch.randn(vectors, width, generator=gen)
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(width)
    index.add(bases.numpy())
    scores, found = torch.empty(vectors, k), torch.empty(vectors, k, dtype=torch.int64)

    def select() -> object:
        return nearest(queries, bases, scores, found, threads)

    stats, samples = in_turns(
        {
            "product": lambda: queries @ bases.T,
            "selection": select,
            "faiss": lambda: index.search(queries.numpy(), k),
            "resolve": lambda: MATRIX_OPS["resolve"](queries, bases, k=k, backend="cpu", threads=threads),
            "lstsq": lambda: torch_least_squares(queries, bases, k),
        },
        rounds,
    )
    best = (queries @ bases.T).abs().topk(k).indices.sort(1).values
    agreeing = float((best == found.sort(1).values).float().mean())
    return {
        "product": [vectors, width, labels, "float32"],
        "k": k,
        "threads": threads,
        "seconds": stats,
        "of_product": {n: stats["product"]["median"] / stats[n]["median"] for n in ("selection", "faiss", "resolve")},
        "ratios": {
            "faiss / selection": stats["faiss"]["median"] / stats["selection"]["median"],
            "lstsq / resolve": stats["lstsq"]["median"] / stats["resolve"]["median"],
        },
        "agreeing": agreeing,
        "samples": samples,
    }


def report(entries: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of the ops among the entries."""
    rows = []
    for name, entry in entries.items():
        if "torch_over_seme" not in entry:
            continue
        times = entry["seconds"]
        row = [name, *(f"{times[k]['median']:.2f}" for k in ("product", "seme", "torch"))]
        row += [f"{entry['of_product'][k]:.2f}" for k in ("seme", "torch")]
        row += [f"{entry['torch_over_seme']:.2f}x", *(f"{entry['peak_mib'][k]:.0f}" for k in ("seme", "torch"))]
        rows.append(row)
    columns = ["product s", "seme s", "torch s", "of product", "torch", "faster than torch", "MiB", "torch"]
    return table(["op", *columns], rows)


def report_whole(entries: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of the whole things among the entries: each provider's time, and the ratios."""
    rows = []
    for name, entry in entries.items():
        if "ratios" in entry:
            times = ", ".join(f"{p} {s['median']:.2f}" for p, s in entry["seconds"].items())
            of = ", ".join(f"{p} {x:.2f}" for p, x in entry["of_product"].items())
            rows.append([name, times, of, ", ".join(f"{p} {x:.1f}x" for p, x in entry["ratios"].items())])
    return table(["what", "seconds", "of product", "ratios"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description="time the matrix ops on a CPU")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="beginnings of names; default: all")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--labels", type=int, default=LABELS)
    parser.add_argument("--few", type=int, default=FEW, help="rows or vectors of the cases with labels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true", help="without TSV-M, which takes minutes")
    parser.add_argument("--out", type=Path, default=RESULTS / "matrix-cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rounds, threads, width, few = options.rounds, options.threads, options.width, options.few
    results = Results(options.out, provenance(), ABOUT)

    def chosen(name: str) -> bool:
        return not options.cases or name.startswith(tuple(options.cases))

    def keep(name: str, entry: dict[str, Any]) -> None:
        results.put(name, entry)
        of = ", ".join(f"{p} {x:.2f}" for p, x in entry["of_product"].items())
        print(f"{name}: of product {of}", flush=True)

    models = make_models(width, width)
    small = Sizes(65, 33, 48, 515, torch.float32)
    tiny = list(cases(make_models(65, 48), small).values())
    for (name, case), check in zip(
        cases(models, Sizes(width, few, width, options.labels, torch.float32)).items(), tiny, strict=True
    ):
        if chosen(name):
            verify(case, check)
            keep(name, measure(case, rounds, threads))
    if chosen(name := f"project {width} x {width}, 3 experts"):
        keep(name, measure_project(models, rounds, threads, not options.no_peers))
    for k in (8, 32):
        if chosen(name := f"resolve {k} of {options.labels} labels, {2 * few} vectors"):
            keep(name, measure_resolve(2 * few, width, options.labels, k, rounds, threads))
    print(report(results.data["entries"]))
    print(report_whole(results.data["entries"]))


if __name__ == "__main__":
    main()
