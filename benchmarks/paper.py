"""What every op must cost on a GPU: flops, bytes, and the time that no kernel can beat. Formulas, not measurements.

``python -m benchmarks.tables`` writes the tables of docs/gpu.md from them, with what was measured in
``benchmarks/results/gpu-*.json``. A test compares the names with the registry.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import MIB, ROOT, load, table
from seme.ops._registry import MATRIX_OPS, OPS

RESOURCES = ROOT / "tests" / "kernels" / "resources.json"
NOT_RUN = "not yet run on a GPU"
PARTS = {"selection": "resolve", "TIES": "ties"}
"""Entries of the results files that are no op of their own, by the first word of their key: part or use of which op."""


@dataclass(frozen=True)
class Gpu:
    """Rates: bytes per second of a copy (read and written), flops per second of sums of products per arithmetic.

    Without tensor cores a rate counts a fused multiply-add as two; an element-wise op may not fuse and gets half.
    """

    name: str
    copy: float
    rates: dict[str, float]


# The H200's copy and bfloat16 rate were measured elsewhere (torch's copy_, a large product of cuBLAS); the A100 copies
# at 1.6 to 1.8 TB/s of its nominal 2.0. All else is the vendor's number.
GPUS = (
    Gpu("H200", 4.3e12, {"bf16": 790e12, "fp32": 67e12, "fp64": 34e12}),
    Gpu("A100", 1.7e12, {"bf16": 312e12, "fp32": 19.5e12, "fp64": 9.7e12}),
)


@dataclass(frozen=True)
class Sizes:
    """What the tables are for: a tensor of `elements`; `rows` x `width` weights, `labels` bases, `few` vectors on k."""

    elements: int = 64 * MIB
    experts: int = 3
    rows: int = 4096
    width: int = 4096
    labels: int = 32000
    few: int = 4096
    k: int = 32


@dataclass(frozen=True)
class Cost:
    """One op on bfloat16 weights; bases, moments and latent vectors are float32.

    Attributes:
        inputs: what it is called with, for the table.
        flops: of its definition.
        bytes: each input read once, the result written once, whatever a kernel really moves.
        arithmetic: what most of the flops are done in: a key of :attr:`Gpu.rates`.
        binds: what is expected to limit it.
        times: flops executed per flop of the definition.
    """

    inputs: str
    flops: Callable[[Sizes], float]
    bytes: Callable[[Sizes], float]
    arithmetic: str
    binds: str
    times: int = 1


ELEMENT_WISE = {
    "weighted_sum": Cost(
        "3",
        lambda s: 2 * s.experts * s.elements,
        lambda s: 2 * (s.experts + 1) * s.elements,
        "fp32", "bandwidth",
    ),
    "task_vector_sum": Cost(
        "1+3",
        lambda s: (3 * s.experts + 2) * s.elements,
        lambda s: 2 * (s.experts + 2) * s.elements,
        "fp32", "bandwidth",
    ),
    "ties": Cost(
        "1+3",
        lambda s: (10 * s.experts + 3) * s.elements,
        lambda s: 2 * (s.experts + 2) * s.elements,
        "fp32", "bandwidth; with a quota that binds, the inputs are read twice",
    ),
    "inner_products": Cost(
        "2",
        lambda s: 6 * s.elements,
        lambda s: 2 * 2 * s.elements,
        "fp64", "bandwidth; on the A100 conversions to float64 come close",
    ),
    "line_products": Cost(
        "2",
        lambda s: 6 * s.elements,
        lambda s: 2 * 2 * s.elements,
        "fp64", "bandwidth",
    ),
    "line_sum": Cost(
        "3",
        lambda s: 2 * s.experts * s.elements,
        lambda s: 2 * (s.experts + 1) * s.elements,
        "fp32", "bandwidth",
    ),
    "nearswap": Cost(
        "1+1",
        lambda s: 7 * s.elements,
        lambda s: 2 * 3 * s.elements,
        "fp32", "bandwidth",
    ),
    "magnitude_histogram": Cost(
        "1+3",
        lambda s: s.experts * s.elements,
        lambda s: 2 * (s.experts + 1) * s.elements,
        "fp32", "atomics: one per element that is not 0, many on the same bins; in CUDA C++ in shared memory",
    ),
    "tie_counts": Cost(
        "1+3",
        lambda s: s.experts * s.elements,
        lambda s: 2 * (s.experts + 1) * s.elements,
        "fp32", "bandwidth",
    ),
    "trimmed_l1": Cost(
        "1+3",
        lambda s: 3 * s.experts * s.elements,
        lambda s: 2 * (s.experts + 1) * s.elements,
        "fp64", "bandwidth; Triton reads the base once per input, 1.5 times the bytes",
    ),
    "sce": Cost(
        "1+3",
        lambda s: (9 * s.experts + 6) * s.elements,
        lambda s: 2 * (s.experts + 2) * s.elements,
        "fp64", "float64 units and conversions: the variance",
    ),
    "selected_squares": Cost(
        "1+3",
        lambda s: (7 * s.experts + 3) * s.elements,
        lambda s: 2 * (s.experts + 1) * s.elements,
        "fp64", "float64 units; Triton forms the variance once per input, 3 times the bytes",
    ),
    "variance_histogram": Cost(
        "1+3",
        lambda s: (5 * s.experts + 3) * s.elements,
        lambda s: 2 * (s.experts + 1) * s.elements,
        "fp64", "atomics, as magnitude_histogram; the variance in float64",
    ),
    "variance_ties": Cost(
        "1+3",
        lambda s: (5 * s.experts + 3) * s.elements,
        lambda s: 2 * (s.experts + 1) * s.elements,
        "fp64", "float64 units and conversions: the variance",
    ),
    "ram": Cost(
        "1+3",
        lambda s: (4 * s.experts + 1) * s.elements,
        lambda s: 2 * (s.experts + 2) * s.elements,
        "fp32", "bandwidth",
    ),
    "overlap_counts": Cost(
        "1+3",
        lambda s: 2 * s.experts * s.elements,
        lambda s: 2 * (s.experts + 1) * s.elements,
        "fp32", "bandwidth",
    ),
    "row_divergence": Cost(
        "1+1",
        lambda s: 68 * s.elements,
        lambda s: 2 * 2 * s.elements,
        "fp64", "float64 units: two exponentials and a logarithm, counted as 20 flops each",
    ),
    "importance_histogram": Cost(
        "1+1",
        lambda s: 2 * s.elements,
        lambda s: 2 * 2 * s.elements,
        "fp32", "atomics, as magnitude_histogram",
    ),
    "importance_fusion": Cost(
        "1+1",
        lambda s: 4 * s.elements,
        lambda s: 2 * 3 * s.elements,
        "fp32", "bandwidth",
    ),
    "nonfinite": Cost("1", lambda s: 0, lambda s: 2 * s.elements, "fp32", "bandwidth"),
}  # fmt: skip

MATRIX = {
    "delta_gram": Cost(
        "1+1",
        lambda s: s.rows * s.width**2,
        lambda s: 4 * s.rows * s.width + 8 * s.width**2,
        "bf16", "tensor cores, bandwidth close",
    ),
    "delta_project": Cost(
        "1+1",
        lambda s: 2 * s.rows * s.width**2,
        lambda s: 12 * s.rows * s.width + 4 * s.width**2,
        "bf16", "tensor cores; the matrix as two bfloat16 numbers, so every product twice", 2,
    ),
    "project_erase": Cost(
        "1+3",
        lambda s: 2 * s.experts * s.rows * s.width**2,
        lambda s: 2 * (s.experts + 2) * s.rows * s.width + 4 * s.experts * s.width**2,
        "bf16", "tensor cores",
    ),
    "semantic_energy": Cost(
        "v, d",
        lambda s: 2 * s.labels * s.width**2,
        lambda s: 4 * s.labels * s.width + 4 * s.width**2,
        "fp32", "float32 units",
    ),
    "weighted_gram": Cost(
        "v, d",
        lambda s: s.labels * s.width**2,
        lambda s: 4 * s.labels * s.width + 8 * s.width**2,
        "fp32", "float32 units; a stable sort of v flags before it",
    ),
    "elect_select": Cost(
        "1+3",
        lambda s: 2 * s.experts * s.rows * s.labels * s.width,
        lambda s: 2 * (s.experts + 1) * s.rows * s.width + 4 * s.labels * s.width,
        "bf16", "tensor cores and atomics: n + 1 additions of 64 bits per position of r x v",
    ),
    "elect": Cost(
        "1+3",
        lambda s: 2 * (s.experts + 1) * s.rows * s.labels * s.width,
        lambda s: 2 * (s.experts + 2) * s.rows * s.width + 8 * s.labels * s.width,
        "bf16", "tensor cores",
    ),
    "resolve": Cost(
        "N, k = 32",
        lambda s: 2 * s.few * s.labels * s.width + s.few * s.k * (s.k + 6) * s.width,
        lambda s: 4 * s.labels * s.width + 12 * s.few * s.width + 8 * s.few * s.k * s.width,
        "fp32", "float32 units (bfloat16 vectors: tensor cores); keeping the k best of v scores",
    ),
}  # fmt: skip


def floor(cost: Cost, sizes: Sizes, gpu: Gpu, fused: bool) -> float:
    """Seconds that no kernel can beat: the greater of moving the bytes and doing the arithmetic."""
    rate = gpu.rates[cost.arithmetic] / (1 if fused else 2)
    return max(cost.bytes(sizes) / gpu.copy, cost.times * cost.flops(sizes) / rate)


def measured(op: str, results: Path) -> str:
    """What the results files of GPUs say about an op: share of the copy's bandwidth or of cuBLAS's rate, with GPU,
    date and commit."""
    found = []
    for file in sorted(results.glob("gpu-*.json")):
        data = load(file)
        for key, entry in data["entries"].items():
            shares = entry.get("of_copy") or entry.get("of_product")
            first = key.split()[0].rstrip(",")
            if PARTS.get(first, first) != op or not shares:
                continue
            run = data["runs"][entry["run"]]
            of = "copy" if "of_copy" in entry else "cuBLAS"
            numbers = ", ".join(f"{backend} {share:.2f}" for backend, share in shares.items() if backend != "torch")
            gpu = run["machine"]["gpu"]["name"].removeprefix("NVIDIA ")
            what = key.removeprefix(op).strip(" ,")
            found.append(f"{what}: {numbers} of {of}, {gpu}, {run['date'][:10]}, {(run['commit'] or 'unknown')[:10]}")
    return "; ".join(found) or NOT_RUN


def digits(x: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def costs_table(costs: dict[str, Cost], fused: bool, results: Path) -> str:
    """All ops of one kind, at the default sizes."""
    sizes, rows = Sizes(), []
    for op, cost in costs.items():
        flops, moved = cost.flops(sizes), cost.bytes(sizes)
        floors = [digits(floor(cost, sizes, gpu, fused) * 1e3) for gpu in GPUS]
        row = [op, cost.inputs, *map(digits, (flops / 1e9, moved / 1e6, flops / moved))]
        rows.append([*row, *floors, cost.arithmetic, cost.binds, measured(op, results)])
    floors = [f"{gpu.name} floor ms" for gpu in GPUS]
    columns = ["inputs", "Gflop", "least MB", "flop/byte", *floors, "arithmetic", "expected to bind", "measured"]
    return table(["op", *columns], rows)


def element_wise_table(results: Path) -> str:
    """Element-wise ops and reductions."""
    return costs_table(ELEMENT_WISE, False, results)


def matrix_table(results: Path) -> str:
    """Ops with matrix products."""
    return costs_table(MATRIX, True, results)


def resources_table(_: Path) -> str:
    """Per compiler and GPU: how many kernels, the most that one takes, and which spill."""
    recorded: dict[str, Any] = json.loads(RESOURCES.read_text())
    rows = []
    for kind, entry in recorded.items():
        compiler = {"triton": "Triton", "cuda": "nvcc"}[kind]
        for gpu in sorted({name.split()[0] for name in entry["kernels"]}):
            kernels = {k.split(" ", 1)[1]: v for k, v in entry["kernels"].items() if k.startswith(f"{gpu} ")}
            spills = {name: k["spill"] for name, k in kernels.items() if k["spill"]}
            row = [f"{compiler} {entry['compiler']}", gpu, str(len(kernels))]
            row += [str(max(k["registers"] for k in kernels.values()))]
            row += [f"{max(k['shared'] for k in kernels.values()) / 1024:.0f}", str(len(spills))]
            worst = max(spills, key=lambda name: spills[name]) if spills else "-"
            rows.append([*row, f"{worst}: {spills[worst]} bytes" if spills else worst])
    return table(["compiler", "GPU", "kernels", "registers at most", "shared KiB at most", "spill", "the most"], rows)


TABLES = {
    "gpu-element-wise": element_wise_table,
    "gpu-matrix": matrix_table,
    "gpu-resources": resources_table,
}


def missing() -> set[str]:
    """Ops that are registered and have no formula here, or the other way round."""
    return (OPS.keys() ^ ELEMENT_WISE.keys()) | (MATRIX_OPS.keys() ^ MATRIX.keys())
