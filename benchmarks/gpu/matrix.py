"""The kernels with matrix products on a GPU: the cases of ``benchmarks.matrix`` against cuBLAS and unfused torch.

Beside them the selection of ``resolve`` alone, and the semantic bases of a whole head. ``benchmarks/gpu/run.sh matrix``
runs this; ``python -m benchmarks.gpu.matrix --dry-run`` only says what would be measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from benchmarks import matrix
from benchmarks.bases import errors
from benchmarks.common import table
from benchmarks.gpu.device import Device, Part, brief, judged
from benchmarks.gpu.measure import make_tensors
from benchmarks.matrix import Case, Sizes, Tensors
from seme import SemanticBases
from seme.ops._registry import MATRIX_OPS
from seme.ops.resolve import nearest
from tests.kernels.matrix import check_low, resolved
from tests.ops import matrix_cases

WIDTH, LABELS = 4096, 32000
SMALL, SMALL_HEAD = (257, 192, 515), (2000, 256)
"""Rows, width and labels of the call, labels and width of the head, that are compared with the reference."""
SMOKE, SMOKE_SMALL, SMOKE_HEAD = (32, 80), (9, 32, 40), (300, 24)
SECONDS = 1.5
"""Of a case, after which no round begins."""
GOALS = {"delta_gram": 0.6, "project_erase": 0.6, "elect_select": 0.5, "elect": 0.5, "selection": 0.6}
"""Share of the rate of cuBLAS's product of as many flops."""
OVER_TORCH = {"selection": 5.0}
"""How much faster than unfused torch it should be."""
BASES_SECONDS = 0.1
"""In which all bases of a head of 32 000 x 4096 should be there."""
NEAREST = 32
SELECTION = f"selection, {NEAREST} labels"
ROUNDED = ("delta_gram", "delta_project", "project_erase", "elect_select", "elect")
"""Ops whose GPU kernels round bfloat16 operands for the tensor cores."""


def sizes(width: int, labels: int) -> Sizes:
    """Square weights; products of weights on the tensor cores."""
    return Sizes(width, width, width, labels, torch.bfloat16)


def cases(models: Tensors, labels: int) -> dict[str, Case]:
    """All cases on square weights: a base, and three fine-tunes of it."""
    width = models[0].shape[0]
    found = matrix.cases(models, sizes(width, labels))
    gen = torch.Generator(models[0].device).manual_seed(1)
    vectors = torch.randn(width, width, generator=gen, device=models[0].device)
    bases = torch.nn.functional.normalize(torch.randn(labels, width, generator=gen, device=models[0].device), dim=1)
    for dtype in (torch.bfloat16, torch.float32):
        found[f"{SELECTION}, {name_of(dtype)}"] = selection(vectors.to(dtype), bases)
    return found


def name_of(dtype: torch.dtype) -> str:
    """Without the module."""
    return str(dtype).removeprefix("torch.")


def selection(vectors: torch.Tensor, bases: torch.Tensor) -> Case:
    """The first half of ``resolve``: the labels nearest to every vector."""
    k = min(NEAREST, len(bases))

    def ours(backend: str) -> torch.Tensor:
        if backend == "cpu":
            found = torch.empty(len(vectors), k, dtype=torch.int64)
            nearest(vectors.float(), bases, bases.new_empty(len(vectors), k), found, 1)
            return found
        module = import_module("seme.kernels.resolve" if backend == "triton" else "seme.ops.cuda")
        found_on_gpu: torch.Tensor = module.nearest(vectors, bases, k)
        return found_on_gpu

    def unfused() -> torch.Tensor:
        rounded = bases.to(vectors.dtype)
        return torch.cat([(part @ rounded.T).abs().topk(k).indices for part in vectors.split(512)])

    return Case("selection", (*vectors.shape, len(bases)), vectors.dtype, ours, unfused)


def backends_of(op: str, among: Sequence[str]) -> list[str]:
    """Those that the op has a kernel in."""
    return [b for b in among if b != "cuda" or op == "selection" or MATRIX_OPS[op].cuda]


def verify(device: Device, op: str, backend: str, size: tuple[int, int, int]) -> float:
    """The kernel is within the bound that the tests hold it to; how far it is off."""
    if op == "selection":
        case = resolved(size, min(NEAREST, size[2]))
        vectors, bases = (t.to(device.name) for t in case.operands)
        labels = selection(vectors, bases).seme(backend=backend).cpu().sort(1).values
        exact = (case.operands[0].double() @ case.operands[1].double().T).abs().topk(case.arguments["k"]).indices
        share = float((labels != exact.sort(1).values).double().mean())
        if share > 0.01:  # labels that score the same to float32 may change places
            raise AssertionError(f"{share:.1%} of the labels are not the nearest")
        return share
    case = resolved(size, 8) if op == "resolve" else matrix_cases.make(op, "bf16", size)
    operands = [[t.to(device.name) for t in o] if isinstance(o, list) else o.to(device.name) for o in case.operands]
    results = [
        t.cpu() for t in matrix_cases.Case(case.op, operands, case.arguments).run(backend, outs=outs(device, case))
    ]
    (check_low if op in ROUNDED and backend != "cpu" else matrix_cases.check)(case, results)
    exact = matrix_cases.Case(case.op, wide(case.operands), case.arguments).plain()[-1]
    found = results[-1].double()
    if op == "elect_select":  # where an energy lies hangs on the last bit of a variance
        found, exact = found.sum(1), exact.sum(1)
    return float((found - exact).norm() / exact.norm())


def outs(device: Device, case: matrix_cases.Case) -> list[torch.Tensor]:
    """Poisoned memory for the results."""
    return [t.to(device.name) for t in case.outs(0)]


def wide(operands: Sequence[Any]) -> list[Any]:
    """The operands in float64."""
    return [[t.double() for t in o] if isinstance(o, list) else o.double() for o in operands]


def measure(
    device: Device, case: Case, rounds: int, backends: Sequence[str], small: tuple[int, int, int]
) -> dict[str, Any]:
    """All providers in turns; an entry of the results file."""
    m, k, n = case.product
    left = torch.randn(m, k, device=device.name).to(case.dtype)
    right = torch.randn(k, n, device=device.name).to(case.dtype)
    out = torch.empty(m, n, dtype=case.dtype, device=device.name)
    checked, failed = {}, {}
    for backend in backends_of(case.op, backends):
        try:
            checked[backend] = verify(device, case.op, backend, small)
        except Exception as e:
            failed[backend] = brief(e)
    calls: dict[str, Callable[[], object]] = {
        "product": lambda: torch.mm(left, right, out=out),
        **{backend: lambda backend=backend: case.seme(backend=backend) for backend in checked},
        "torch": case.torch,
    }
    calls, more = device.working(calls)
    failed |= more
    stats, samples = device.in_turns(calls, rounds, SECONDS)
    speed = {name: case.flops / stats[name]["median"] / 1e12 for name in stats}
    ours = [b for b in checked if b in calls]
    return {
        "goal": GOALS.get(case.op),
        "goal_over_torch": OVER_TORCH.get(case.op),
        "flops": case.flops,
        "product": [*case.product, name_of(case.dtype)],
        "checked": checked,
        **({"failed": failed} if failed else {}),
        "seconds": stats,
        "tflops": speed,
        "of_product": {name: speed[name] / speed["product"] for name in speed if name != "product"},
        "torch_over": {b: stats["torch"]["median"] / stats[b]["median"] for b in ours if "torch" in stats},
        "peak_mib": {name: device.peak(call) for name, call in calls.items() if name != "product"},
        "samples": samples,
    }


def make_head(labels: int, width: int, device: str) -> torch.Tensor:
    """As ``benchmarks.bases`` makes it, on the device: a decaying spectrum, and a mean that all rows share."""
    gen = torch.Generator(device).manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=gen, device=device))[0]
    scale = torch.arange(1, width + 1, device=device) ** -0.35
    head = torch.randn(labels, width, generator=gen, device=device).mul_(scale) @ rotation
    return head.add_(0.7 * scale.norm() * rotation[width // 2])


def measure_bases(device: Device, size: tuple[int, int], small: tuple[int, int], rounds: int) -> dict[str, Any]:
    """The inverse of a head's Gram matrix, and all its unit bases; errors of a small head against float64."""
    head = make_head(*small, device.name)
    gram = head.double().T @ head.double()
    exact = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    error = errors(SemanticBases.from_head(head).matrix(), head, exact, normalized=True)
    if error["max"] > 1e-4:  # float32 and the condition of the head made here
        raise AssertionError(f"bases are off by {error['max']:.1e}")
    large = make_head(*size, device.name)
    square = torch.randn(size[1], size[1], device=device.name)
    calls: dict[str, Callable[[], object]] = {
        "product": lambda: large @ square,
        "inverse": lambda: SemanticBases.from_head(large),
        "bases": lambda: SemanticBases.from_head(large).matrix(),
    }
    calls, failed = device.working(calls)
    stats, samples = device.in_turns(calls, rounds, 2 * SECONDS)
    return {
        "goal": BASES_SECONDS,
        "checked": {"bases": error["max"]},
        **({"failed": failed} if failed else {}),
        "product": [size[0], size[1], size[1], "float32"],
        "seconds": stats,
        "peak_mib": {name: device.peak(call) for name, call in calls.items() if name != "product"},
        "samples": samples,
    }


def report(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown tables of entries of the results file; what failed, or a provider has no kernel for, has no number."""
    found = {name: e for name, e in entries.items() if "of_product" in e}
    backends = list(dict.fromkeys(b for e in found.values() for b in e["checked"]))

    def cells(values: Mapping[str, Any], names: Sequence[str], style: Callable[[Any], str]) -> list[str]:
        return [style(values[n]) if n in values else "-" for n in names]

    rows = []
    for name, e in found.items():
        row = [name, *cells(e["seconds"], ("product", *backends, "torch"), lambda s: f"{s['median'] * 1e3:.2f}")]
        row += cells(e["of_product"], backends, lambda x, e=e: judged(x, e["goal"]))
        row += cells(e["torch_over"], backends, lambda x, e=e: judged(x, e["goal_over_torch"], "{:.1f}x"))
        row += cells(e["checked"], backends, lambda x: f"{x:.0e}")
        row += cells(e["peak_mib"], (*backends, "torch"), lambda x: f"{x:.0f}")
        rows.append([*row, "-" if e["goal"] is None else f"{e['goal']:.2f}"])
    header = ["op", *(f"{p} ms" for p in ("product", *backends, "torch"))]
    header += [*(f"{b} of product" for b in backends), *(f"{b} over torch" for b in backends)]
    header += [*(f"{b} off by" for b in backends), *(f"{p} MiB" for p in (*backends, "torch"))]
    tables = [table([*header, "goal"], rows)]
    rows = []
    for name, e in entries.items():
        if "inverse" in e.get("seconds", {}):
            times = {p: s["median"] for p, s in e["seconds"].items()}
            row = [name, f"{times['product'] * 1e3:.1f}", f"{times['inverse'] * 1e3:.1f}"]
            row.append(f"{judged(times['bases'] * 1e3, e['goal'] * 1e3, '{:.1f}', at_most=True)}")
            rows.append([*row, f"{e['checked']['bases']:.0e}", f"{e['peak_mib']['bases']:.0f}"])
    tables.append(table(["head", "product ms", "inverse ms", "all bases ms", "off by", "MiB"], rows))
    return "\n\n".join(tables)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.matrix", description="time the matrix kernels")
    parser.add_argument("--width", type=int, help=f"rows and columns of the weights; default {WIDTH}")
    parser.add_argument("--labels", type=int, help=f"bases; default {LABELS}")
    parser.add_argument("--rounds", type=int, help="samples of each provider; default 30")
    part = Part("matrix", parser, arguments)
    smoke = part.device.smoke
    width, labels = SMOKE if smoke else (WIDTH, LABELS)
    width, labels = part.options.width or width, part.options.labels or labels
    rounds = part.options.rounds or (1 if smoke else 30)
    bases = f"bases of {labels} x {width}"
    if part.options.dry_run:
        rows = []
        for name, (op, product, dtype) in sizes(width, labels).products().items():
            rows.append(
                [name, f"{2e-12 * product[0] * product[1] * product[2]:.2f}", name_of(dtype), f"{GOALS.get(op)}"]
            )
        for dtype in (torch.bfloat16, torch.float32):
            goal = f"{GOALS['selection']}"
            rows.append([f"{SELECTION}, {name_of(dtype)}", f"{2e-12 * width**2 * labels:.2f}", name_of(dtype), goal])
        rows.append([bases, f"{2e-12 * width**2 * labels:.2f}", "float32", f"{BASES_SECONDS} s"])
        print(table(["op, tensors", "Tflop", "product", "goal"], [row for row in rows if part.chosen(row[0])]))
        return
    part.open()
    if part.chosen(bases):
        small = SMOKE_HEAD if smoke else SMALL_HEAD
        part.measure(bases, lambda: measure_bases(part.device, (labels, width), small, rounds))
    models = [t.view(width, width) for t in make_tensors(width**2, part.device.name)]
    for name, case in cases(models, labels).items():
        if part.chosen(name):

            def make(case: Case = case) -> dict[str, Any]:
                return measure(part.device, case, rounds, part.usable(), SMOKE_SMALL if smoke else SMALL)

            part.measure(name, make)
    print(report(part.entries))
    part.close()


if __name__ == "__main__":
    main()
