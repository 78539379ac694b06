"""Tries launch parameters of the Triton kernels on the GPU that is here, and prints rows for ``kernels/tables.py``.

``python -m benchmarks.gpu.tune`` times every candidate on the cases of ``benchmarks.ops`` and ``benchmarks.matrix``;
with ``--dry-run`` it lists the candidates and needs no GPU. A candidate counts only if its result is that of the shape
in the table: the same bits, for matrix ops the same up to the order of sums. Nothing is written: what is better goes
into the table by hand, with the numbers in the commit's message.

Candidates are those that make sense on paper: 4 to 32 elements per thread; sums that leave half of a thread's registers
to all else, and tiles for all pipeline stages in shared memory. Which do not fit after all is found out at the launch.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from seme.kernels import tables
from seme.kernels.tables import Flat, Tiles

from benchmarks import matrix, ops
from benchmarks.common import MIB, table
from seme.native import BLOCK

SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that one program can have."""
REDUCTIONS = ("inner_products", "selected_squares", "trimmed_l1")
OPERANDS = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
BYTES = {"bfloat16": 2, "float32": 4}
SUMS = {"bfloat16": (32, 128), "float32": (16, 64)}
"""The least and the most sums per thread; a tensor core has the operands of more of them at hand."""
STAGES = {"bfloat16": (3, 4), "float32": (2, 3)}

Shape = Flat | Tiles
Timer = Callable[[Callable[[], Any]], float]


def flat_candidates(op: str) -> list[Flat]:
    """How an element-wise op may be cut up."""
    if op in REDUCTIONS:  # a thread holds sums of some of the 64 lanes of some blocks
        shapes = [(group, warps, 2 * group // warps) for group, warps in product((1, 2, 4, 8, 16), (1, 2, 4, 8))]
        return [Flat(group * BLOCK, warps) for group, warps, lanes in shapes if 4 <= lanes <= 16]
    shapes = [(size, warps, size // 32 // warps) for size, warps in product((256, 512, 1024, 2048, 4096), (1, 2, 4, 8))]
    return [Flat(size, warps) for size, warps, elements in shapes if 4 <= elements <= 32]


def tile_candidates(operand: str, capability: int) -> list[Tiles]:
    """How the products of an operand may be cut up."""
    found = []
    least, most = SUMS[operand]
    for m, n, k, warps, stages in product((64, 128, 256), (64, 128, 256), (32, 64), (4, 8), STAGES[operand]):
        flat, sums = max(m, n) > 2 * min(m, n), m * n // (32 * warps)
        if not flat and least <= sums <= most and stages * (m + n) * k * BYTES[operand] <= SHARED[capability]:
            found.append(Tiles(m, n, k, warps, stages))
    return found


def takes(op: str, shape: Shape) -> bool:
    """Symmetric results are cut up into squares."""
    return op not in ("delta_gram", "weighted_gram") or (isinstance(shape, Tiles) and shape.m == shape.n)


@contextmanager
def using(row: dict[str, Any], key: str, shape: Shape) -> Iterator[None]:
    """The table has this shape for a while."""
    before = row[key]
    row[key] = shape
    try:
        yield
    finally:
        row[key] = before


def agree(found: Any, expected: Any, exact: bool) -> bool:
    """The same results: bits, or values up to 1 % of their norm (a bfloat16 result has 0.4 % of each value)."""
    one, other = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    for a, b in zip(one, other, strict=True):
        if exact and not torch.equal(a, b):
            return False
        if not exact and a.is_floating_point():
            a, b = a.double(), b.double()
            if not (a - b).norm() <= 0.01 * b.norm():
                return False
    return True


def try_shapes(
    call: Callable[[], Any], row: dict[str, Any], key: str, shapes: Sequence[Shape], timer: Timer, exact: bool
) -> dict[Shape, float]:
    """Milliseconds by shape, the table's first; those that do not fit or give something else are left out."""
    from triton.runtime.errors import OutOfResources

    own = row[key]
    expected = call()
    times = {own: timer(call)}
    for shape in shapes:
        if shape == own:
            continue
        with using(row, key, shape):
            try:
                if agree(call(), expected, exact):
                    times[shape] = timer(call)
                else:
                    print(f"{key}: {shape} gives another result")
            except OutOfResources:
                continue
    return times


def best(times: dict[str, dict[Shape, float]]) -> Shape:
    """The shape with the smallest geometric mean of times relative to the table's, of those that all ops ran with.

    An op that does not take a shape (see :func:`takes`) excludes it: the table has one shape for all ops of an operand.
    """
    first = next(iter(times.values()))
    shared = [shape for shape in first if all(shape in found for found in times.values())]

    def cost(shape: Shape) -> float:
        return math.fsum(math.log(found[shape] / next(iter(found.values()))) for found in times.values())

    return min(shared, key=cost)


def report(times: dict[str, dict[Shape, float]], most: int = 4) -> str:
    """A Markdown table: per op the shape of the table, and the fastest ones."""
    rows = []
    for op, found in times.items():
        own = next(iter(found))
        for shape in [own, *sorted(found.keys() - {own}, key=lambda s: found[s])[:most]]:
            rows.append([op, str(shape), f"{found[shape]:.4f}", f"{found[own] / found[shape]:.2f}x"])
    return table(["op", "shape (the table's first)", "ms", "faster"], rows)


def first_cases(cases: dict[str, Any], chosen: Sequence[str] | None) -> dict[str, Any]:
    """By op, the first of its cases; of the chosen ops."""
    found: dict[str, Any] = {}
    for key, case in cases.items():
        found.setdefault(key.split()[0].rstrip(","), case)
    return {op: case for op, case in found.items() if not chosen or op in chosen}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.tune", description="try launch parameters")
    parser.add_argument("--ops", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--elements", type=int, default=64 * MIB, help="per tensor, of element-wise ops")
    parser.add_argument("--width", type=int, default=4096, help="rows and columns of the weights in matrix products")
    parser.add_argument("--labels", type=int, default=32000, help="bases in matrix products")
    parser.add_argument("--seconds", type=float, default=480, help="begin no other op after so long")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates; needs no GPU")
    options = parser.parse_args(arguments)
    sizes = matrix.Sizes(options.width, options.width, options.width, options.labels, torch.bfloat16)
    operands = {op: OPERANDS[dtype] for op, _, dtype in sizes.products().values()}

    if options.dry_run:
        lists = {op: flat_candidates(op) for op in first_cases(ops.cases(0), options.ops)}
        for capability, (op, operand) in product(tables.TILES, first_cases(operands, options.ops).items()):
            shapes = [s for s in tile_candidates(operand, capability) if takes(op, s)]
            lists[f"{op}, sm_{capability}, {operand}"] = shapes
        for name, shapes in lists.items():
            print(f"{name}: {len(shapes)}: {', '.join('/'.join(map(str, shape)) for shape in shapes)}")
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu.tune: no CUDA GPU here; --dry-run says what would be tried")
    from triton.testing import do_bench

    def timer(call: Callable[[], Any]) -> float:
        milliseconds: float = do_bench(call, warmup=5, rep=50, return_mode="median")
        return milliseconds

    start = time.perf_counter()
    capability = tables.generation(torch.device("cuda"))
    tensors = [t.cuda() for t in ops.make_tensors(max(options.elements, options.width**2))]
    parts = [t[: options.elements] for t in tensors]
    rows: list[str] = []
    for op, case in first_cases(ops.cases(ops.threshold(tensors)), options.ops).items():
        if time.perf_counter() - start > options.seconds:
            break
        call = lambda case=case: case.seme(parts[: case.inputs], backend="triton")  # noqa: E731
        times = {op: try_shapes(call, tables.FLAT[capability], op, flat_candidates(op), timer, exact=True)}
        print(report(times), flush=True)
        rows.append(f'        "{op}": {best(times)},')
    models = [t[: options.width**2].view(options.width, options.width) for t in tensors]
    by_operand: dict[str, dict[str, dict[Shape, float]]] = {}
    for op, case in first_cases(matrix.cases(models, sizes), options.ops).items():
        if time.perf_counter() - start > options.seconds:
            break
        operand = operands[op]
        shapes = [s for s in tile_candidates(operand, capability) if takes(op, s)]
        call = lambda case=case: case.seme(backend="triton")  # noqa: E731
        times = {op: try_shapes(call, tables.TILES[capability], operand, shapes, timer, exact=False)}
        print(report(times), flush=True)
        by_operand.setdefault(operand, {}).update(times)
    rows += [f'        "{operand}": {best(times)},' for operand, times in by_operand.items()]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; for {capability} in kernels/tables.py:")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
