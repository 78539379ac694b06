"""The kernels with matrix products on a GPU: against cuBLAS's product of the same flops, and against unfused torch.

``benchmarks.gpu.measure`` runs these cases after the element-wise ones. A case is a call on matrices of a 7 B model: a
square projection of 4096, 32 000 labels. ``of_product`` is what counts; 1 would be a kernel that costs no more than
the plain product in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import MIB, summarize, table
from seme.ops._registry import MATRIX_OPS
from tests.kernels.matrix import check_low, resolved
from tests.ops import matrix_cases

ABOUT = {
    "flops": "multiplications and additions of the op's definition; half of a plain product for symmetric results",
    "product": "[m, k, n] and dtype of the cuBLAS product of as many flops that is timed in the same rounds",
    "tflops": "flops / median seconds / 1e12, by provider: product (cuBLAS), triton, cuda, torch",
    "of_product": "median TFLOP/s of a provider / median TFLOP/s of the product",
    "peak_mib": "memory that a call allocates beyond its operands at its peak, its results included, by provider",
}

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

    def backends(self, among: Sequence[str]) -> list[str]:
        """Those that the op has a kernel in."""
        return [b for b in among if b == "triton" or MATRIX_OPS[self.op].cuda]


def sizes(width: int, labels: int) -> dict[str, tuple[str, tuple[int, int, int], torch.dtype]]:
    """Op, product and its dtype of every case, for square weights and a head of that width."""
    d, v, bf16, f32 = width, labels, torch.bfloat16, torch.float32
    return {
        "delta_gram": ("delta_gram", (d, d // 2, d), bf16),
        "delta_project": ("delta_project", (d, d, d), bf16),
        "project_erase 1+3": ("project_erase", (d, 3 * d, d), bf16),
        "elect_select 1+3": ("elect_select", (d, 3 * d, v), bf16),
        "elect 1+3": ("elect", (d, 4 * d, v), bf16),
        "semantic_energy": ("semantic_energy", (v, d, d), f32),
        "weighted_gram, a tenth": ("weighted_gram", (d, v // 20, d), f32),
        "resolve 8 of 4096": ("resolve", (d, d, v), f32),
    }


def cases(models: Tensors, labels: int) -> dict[str, Case]:
    """All cases on square weights: a base, and three fine-tunes of it."""
    base, *experts = models
    width, device = base.shape[0], base.device
    gen = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, device=device)

    bases = torch.nn.functional.normalize(normal(labels, width), dim=1)
    dual = bases / (labels / width)
    moments = [m @ m.T / width for m in (normal(width, width) / width**0.5 for _ in experts)]
    weights = normal(labels).abs_() * (torch.rand(labels, generator=gen, device=device) < 0.1)
    vectors = normal(width, width)
    etas, threshold = [0.4, 0.35, 0.25], int(torch.tensor(1e-5).view(torch.int32))
    operands: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "delta_gram": ((base, experts[0]), {}),
        "delta_project": ((base, experts[0], moments[0]), {}),
        "project_erase": ((base, experts, moments), {"scale": 1.0}),
        "elect_select": ((base, experts, bases), {"lowest": 0, "shift": 15}),
        "elect": ((base, experts, bases, dual), {"threshold": threshold, "etas": etas}),
        "semantic_energy": ((bases, moments[0]), {}),
        "weighted_gram": ((bases, weights), {}),
        "resolve": ((vectors, bases), {"k": 8}),
    }

    def call(name: str) -> Callable[..., Any]:
        given, arguments = operands[name]
        return lambda **options: MATRIX_OPS[name](*given, **arguments, **options)

    def unfused(name: str) -> Callable[[], Any]:
        given, _ = operands[name]
        return lambda: UNFUSED[name](*given)

    return {
        key: Case(name, product, dtype, call(name), unfused(name))
        for key, (name, product, dtype) in sizes(width, labels).items()
    }


# Plain torch, as one would write it; products of weights in bfloat16, those of bases in float32.


def torch_delta_gram(base: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """T^T T."""
    delta = tensor - base
    return (delta.T @ delta).float()


def torch_delta_project(base: torch.Tensor, tensor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """T M."""
    return ((tensor - base) @ matrix.to(base.dtype)).float()


def torch_project_erase(base: torch.Tensor, tensors: Tensors, projections: Tensors) -> torch.Tensor:
    """W_0 + sum_m T_m P_m."""
    merged = base.float()
    for tensor, projection in zip(tensors, projections, strict=True):
        merged += (tensor - base) @ projection.to(base.dtype)
    return merged.to(base.dtype)


def torch_coordinates(base: torch.Tensor, tensors: Tensors, bases: torch.Tensor) -> Tensors:
    """T_m S^T of all experts."""
    rounded = bases.to(base.dtype)
    return [((t - base) @ rounded.T).float() for t in tensors]


def torch_elect_select(base: torch.Tensor, tensors: Tensors, bases: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
    """Histogram of the variances, and energies per bin."""
    z = torch_coordinates(base, tensors, bases)
    bins = (torch.stack(z).var(0, correction=0).view(torch.int32) >> 15).flatten()
    return torch.bincount(bins, minlength=65537), [torch.bincount(bins, x.flatten().square(), 65537) for x in z]


def torch_elect(base: torch.Tensor, tensors: Tensors, bases: torch.Tensor, dual: torch.Tensor) -> torch.Tensor:
    """Select, elect, mean of those that agree, recompose."""
    z = torch.stack(torch_coordinates(base, tensors, bases))
    etas = torch.tensor([0.4, 0.35, 0.25], device=base.device)[:, None, None]
    agree = (z * torch.where(z.sum(0) >= 0, 1.0, -1.0) > 0) * etas
    share = agree.sum(0)
    combined = (agree * z).sum(0).div_(share.masked_fill_(share == 0, 1.0))
    combined *= z.var(0, correction=0) >= 1e-5
    return base + combined.to(base.dtype) @ dual.to(base.dtype)


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


def verify(op: str, backend: str) -> None:
    """On the GPU, the kernel is within the bound that the tests hold it to: no number without a right result."""
    size = (257, 192, 515)
    case = resolved(size, 8) if op == "resolve" else matrix_cases.make(op, "bf16", size)
    on_gpu = [[t.cuda() for t in o] if isinstance(o, list) else o.cuda() for o in case.operands]
    found = case.op(*on_gpu, backend=backend, **case.arguments)
    results = [t.cpu() for t in (found if isinstance(found, tuple) else (found,))]
    rounds = op in ("delta_gram", "delta_project", "project_erase", "elect_select", "elect")
    (check_low if rounds else matrix_cases.check)(case, results)


def peak(call: Callable[[], object]) -> float:
    """MiB that a call allocates at its peak."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)


def measure(
    case: Case, rounds: int, backends: Sequence[str], time: Callable[..., tuple[torch.cuda.Event, torch.cuda.Event]]
) -> dict[str, Any]:
    """All providers in turns, after two rounds that do not count; an entry of the results file."""
    m, k, n = case.product
    left = torch.randn(m, k, device="cuda").to(case.dtype)
    right = torch.randn(k, n, device="cuda").to(case.dtype)
    out = torch.empty(m, n, dtype=case.dtype, device="cuda")
    busy = torch.empty(64 * MIB, dtype=torch.int32, device="cuda")
    backends = case.backends(backends)
    calls: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(left, right, out=out),
        **{backend: lambda backend=backend: case.seme(backend=backend) for backend in backends},
        "torch": case.torch,
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-2, rounds):
        for name, call in calls.items():
            start, end = time(call, busy.zero_)
            torch.cuda.synchronize()
            if number >= 0:
                samples[name].append(round(start.elapsed_time(end) / 1e3, 9))
    stats = {name: summarize(times) for name, times in samples.items()}
    speed = {name: case.flops / stats[name]["median"] / 1e12 for name in stats}
    return {
        "flops": case.flops,
        "product": [*case.product, str(case.dtype).removeprefix("torch.")],
        "seconds": stats,
        "tflops": speed,
        "of_product": {name: speed[name] / speed["product"] for name in (*backends, "torch")},
        "torch_over": {backend: stats["torch"]["median"] / stats[backend]["median"] for backend in backends},
        "peak_mib": {name: peak(calls[name]) for name in (*backends, "torch")},
        "samples": samples,
    }


def report(entries: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of entries of the results file; a provider that has no kernel has no number."""
    providers = ("triton", "cuda", "torch")

    def cells(values: dict[str, float], style: str) -> list[str]:
        return [style.format(values[p]) if p in values else "-" for p in providers]

    rows = []
    for name, entry in entries.items():
        milliseconds = {p: s["median"] * 1e3 for p, s in entry["seconds"].items()}
        rows.append([name, f"{milliseconds['product']:.2f}", *cells(milliseconds, "{:.2f}")])
        rows[-1] += [*cells(entry["of_product"], "{:.2f}"), *cells(entry["peak_mib"], "{:.0f}")]
    columns = [f"{p} {what}" for what in ("ms", "of product", "MiB") for p in providers]
    return table(["op", "product ms", *columns], rows)
