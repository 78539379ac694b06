"""The kernels with matrix products on a GPU: the cases of ``benchmarks.matrix`` against cuBLAS and unfused torch.

``benchmarks.gpu.measure`` runs them after the element-wise ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import matrix
from benchmarks.common import MIB, summarize, table
from benchmarks.matrix import Case, Sizes, Tensors
from seme.ops._registry import MATRIX_OPS
from tests.kernels.matrix import check_low, resolved
from tests.ops import matrix_cases

ABOUT = matrix.ABOUT | {
    "tflops": "flops / median seconds / 1e12, by provider: product (cuBLAS), triton, cuda, torch",
    "peak_mib": "memory that a call allocates beyond its operands at its peak, its results included, by provider",
}


def sizes(width: int, labels: int) -> Sizes:
    """Square weights; products of weights on the tensor cores."""
    return Sizes(width, width, width, labels, torch.bfloat16)


def cases(models: Tensors, labels: int) -> dict[str, Case]:
    """All cases on square weights: a base, and three fine-tunes of it."""
    return matrix.cases(models, sizes(models[0].shape[0], labels))


def backends_of(op: str, among: Sequence[str]) -> list[str]:
    """Those that the op has a kernel in."""
    return [b for b in among if b == "triton" or MATRIX_OPS[op].cuda]


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
    backends = backends_of(case.op, backends)
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
