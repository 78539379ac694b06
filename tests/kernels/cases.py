"""Calls of every op, on tensors that have all that goes wrong: signed zeros, ties, subnormals, inf and NaN.

A kernel is called as the ops call it, on flat tensors, into an output with guards around it; what it gives is
compared with the reference bit by bit. A NaN equals a NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seme import dtypes
from seme.dtypes import DType, bfloat16, float16, float32, float64
from seme.ops._op import Op, Spec
from seme.ops._registry import OPS
from seme.ops._task_vectors import UNLIMITED, deltas, magnitude_keys
from seme.ops._variance import variance

Tensors = list[torch.Tensor]
Launch = Callable[..., None]

# Stored dtypes (of the base and the others in turn) and compute dtype.
DTYPES: dict[str, tuple[tuple[DType, ...], DType]] = {
    "bf16": ((bfloat16,), bfloat16),
    "bf16-in-f32": ((bfloat16,), float32),
    "f16": ((float16,), float16),
    "f32": ((float32,), float32),
    "f64": ((float64,), float64),
    "mixed-in-bf16": ((float32, bfloat16, float64, float16), bfloat16),
    "mixed-in-f16": ((float64, float16, float32, bfloat16), float16),
    "mixed-in-f64": ((bfloat16, float32, float16, float64), float64),
}
INF, NAN = float("inf"), float("nan")
SPECIAL = (0.0, -0.0, INF, -INF, NAN, 1e-40, -1e-41, 6e-8, 65504.0, 65520.0, 3.3e38, 3.4e38, 5e-324)
SUMS = ("inner_products", "line_products", "selected_squares", "trimmed_l1")
BOUNDS = {"row_divergence": 1e-12}
"""Ops that are equal to a relative error, because exp and log are each backend's own; see the op."""


def make_tensors(name: str, numel: int, stored: tuple[DType, ...], count: int = 4) -> Tensors:
    """`count` tensors for the op `name`: a base, and others that equal it in half of the elements.

    Half of the elements lie on a grid, so that many differences are equal. Sums get numbers of very different size,
    so that their order matters, and nothing that makes them all NaN.
    """
    generator = torch.Generator().manual_seed(numel)

    def normal(grid: int) -> torch.Tensor:
        return (torch.randn(numel, dtype=torch.float64, generator=generator) * grid).round() / grid

    def half() -> torch.Tensor:
        return torch.rand(numel, generator=generator) < 0.5

    tensors = [torch.where(half(), normal(32), normal(1 << 40))]
    for _ in range(count - 1):
        tensors.append(tensors[0] + torch.where(half(), normal(8) / 4, 0.0))
    if name in SUMS:
        size = torch.randint(-13, 14, (numel,), generator=generator)
        tensors = [t * 2.0**size for t in tensors]
    elif numel >= 63:
        for tensor in tensors:
            places = torch.randperm(numel, generator=generator)[: len(SPECIAL)]
            tensor[places] = torch.tensor(SPECIAL, dtype=torch.float64)
            tensor[-5:] = -0.0  # a base of -0 keeps its sign only if nothing but -0 is added
    return [t.to(stored[i % len(stored)].to_torch()) for i, t in enumerate(tensors)]


def common_keys(tensors: Tensors, compute: DType) -> list[tuple[int, int]]:
    """The most frequent key of each task vector that is not zero's, and how many elements have it."""
    found = []
    for delta in deltas(tensors, compute):
        keys, counts = magnitude_keys(delta).unique(return_counts=True)
        best = counts.where(keys > 0, 0).argmax() if len(keys) else 0
        found.append((int(keys[best]), int(counts[best])) if len(keys) else (0, 0))
    return found


def long_row(numel: int) -> int:
    """Elements of a row, such that ``numel`` are whole rows: its largest proper divisor."""
    return next((numel // d for d in (2, 3, 5, 7, 11, 13) if numel and numel % d == 0), max(1, numel))


def weight_sets(count: int, numel: int) -> list[dict[str, Any]]:
    """Arguments with weights of their own for rows, and for columns from the middle of a row on."""
    row = long_row(numel)
    generator = torch.Generator().manual_seed(numel)
    table = torch.randn(count * max(row, numel // row), dtype=torch.float64, generator=generator).tolist()
    by_row = {"weights": table[: count * (numel // row)], "row": row}
    return [by_row, {"weights": table[: count * row], "columns": row, "offset": row // 2}]


def common_variance(tensors: Tensors, compute: DType) -> tuple[int, int]:
    """The most frequent key of the variance that is not zero's, and how many elements have it."""
    keys, counts = magnitude_keys(variance(deltas(tensors, compute))).unique(return_counts=True)
    best = counts.where(keys > 0, 0).argmax() if len(keys) else 0
    return (int(keys[best]), int(counts[best])) if len(keys) else (0, 0)


def row_of(numel: int) -> int:
    """The largest divisor of at most 64, of a prime the number itself."""
    best = max((d for d in range(1, 65) if numel % d == 0), default=1) if numel else 1
    return best if best > 1 else max(1, numel)


def calls(name: str, tensors: Tensors, compute: DType) -> list[tuple[Tensors, dict[str, Any]]]:
    """(tensors, arguments) of several calls of one op."""
    n, numel = len(tensors) - 1, tensors[0].numel()
    weights = [0.3, -0.7, 1.1, 0.5][:n]
    if name == "weighted_sum":
        return [(tensors, {"weights": [0.2, *weights], "divisor": d}) for d in (1.0, 0.7)]
    if name == "line_products":
        lines = 2 * long_row(numel)  # so that the last block of columns is shorter if the rows are an odd number
        columns = {"row": lines, "columns": long_row(numel)}
        by_row = [(tensors[:3], {"row": long_row(numel)}), (tensors, {"row": long_row(numel), "relative": True})]
        plain = [(tensors[:1], {}), (tensors[:3], {}), (tensors[:2], {"relative": True})]
        return [*plain, *by_row, (tensors[:3], columns), (tensors, {**columns, "relative": True})]
    if name == "line_sum":
        calls = [(tensors[:3], s) for s in weight_sets(min(n + 1, 3), numel)]
        return calls + [(tensors, {**s, "relative": True}) for s in weight_sets(n, numel)]
    if name == "nearswap":
        return [(tensors[:2], {"t": t}) for t in (0.1, 1e-3, -0.5)]
    if name == "inner_products":
        return [(tensors[:1], {}), (tensors[:3], {})]
    if name == "nonfinite":
        return [(tensors, {})]
    if name in ("sce", "selected_squares", "variance_histogram", "variance_ties"):
        key, count = common_variance(tensors, compute)
        bits = {2: 15, 4: 31, 8: 63}[compute.itemsize]
        if name == "variance_histogram":
            windows = [(0, max(0, bits - 16)), (max(0, key - 32768), 1), (2**63 - 1, 47)]
            return [(tensors, {"lowest": lowest, "shift": shift}) for lowest, shift in windows]
        if name == "variance_ties":
            return [(tensors, {"thresholds": [k]}) for k in (key, 0, 2**63 - 1)]
        quotas = [(0, UNLIMITED), (key, max(1, count * 2 // 3) if key else 0), (key, UNLIMITED), (2**63 - 1, 0)]
        own = {"coefficients": [0.7, 1e-7, 0.3][:n]} if name == "sce" else {}
        few = [(tensors[:2], {**own, **({"coefficients": [1.0]} if own else {}), "thresholds": [0], "tie_quotas": [0]})]
        return few + [(tensors, {**own, "thresholds": [k], "tie_quotas": [q]}) for k, q in quotas]
    if name in ("ram", "overlap_counts"):
        if name == "overlap_counts":
            return [(tensors, {"epsilon": e}) for e in (1e-5, 0.3)]
        scales = {"scales": [1.1, 1.0, 0.7][:n], "epsilon": 0.3, "rounded": False}
        return [(tensors[:2], {"scales": [1.0], "epsilon": 0.0})] + [
            (tensors, s) for s in (scales, {"scales": [1.0] * n, "epsilon": 1e-5})
        ]
    if name in ("row_divergence", "importance_histogram", "importance_fusion"):
        pair, row = tensors[:2], row_of(numel)
        if name == "row_divergence":
            return [(pair, {"row": row}), (pair, {"row": row, "rounded": compute.itemsize == 2})]
        below = 0.5 if compute.itemsize == 2 else 0.0  # factors may be negative where keys have a sign
        rows = {"row": row, "factors": [i * 37 % 101 / 64 - below for i in range(numel // row)]}
        if name == "importance_fusion":
            return [(pair, {**rows, "threshold": t}) for t in (0.0, 0.125)]
        whole = {2: 0, 4: 15, 8: 47}[compute.itemsize]
        middle = {2: 0x8000 + 0x3D00, 4: 0x3D000000, 8: 0x3FA0000000000000}[compute.itemsize]
        windows = {"lowest": [middle, 0, 2**63 - 1], "shift": [1, 3, 47]}
        return [(pair, {**rows, "lowest": [0], "shift": [whole]}), (pair, {**rows, **windows})]
    common = common_keys(tensors, compute)
    keys = [key for key, _ in common]
    if name == "magnitude_histogram":
        bits = {2: 15, 4: 31, 8: 63}[compute.itemsize]
        whole = {"lowest": [0] * n, "shift": [max(0, bits - 16)] * n}
        narrow = {"lowest": [max(0, k - 32768) for k in keys], "shift": [i % 2 for i in range(n)]}
        none = {"lowest": [2**63 - 1] * n, "shift": [47] * n}
        return [(tensors, whole), (tensors, narrow), (tensors, none)]
    if name == "tie_counts":
        others = [0, 2**63 - 1, keys[-1]][:n]
        return [(tensors, {"thresholds": thresholds}) for thresholds in (keys, others, [*others, *keys])]
    some = [max(1, count * 2 // 3) for _, count in common]
    selections = [
        {"thresholds": keys, "tie_quotas": [UNLIMITED] * n},
        {"thresholds": keys, "tie_quotas": some},
        {"thresholds": [0, *keys[1:]], "tie_quotas": [numel // 9, 0, UNLIMITED, 1][:n]},
        {"thresholds": [2**63 - 1] * n, "tie_quotas": [0] * n},
        {"thresholds": [*[k // 2 for k in keys], *keys], "tie_quotas": [*[numel // 9] * n, *some]},
        {"thresholds": [*keys, *keys], "tie_quotas": [*some, *[s // 2 for s in some]]},
        {"chances": [2**31 + 12345, 0, 2**32][:n], "seeds": [2**62 + 17, 3, 4][:n], "offset": 2**40 * 8},
        {"chances": [2**30] * n, "seeds": [*range(n)], "offset": 3, "thresholds": keys, "tie_quotas": some},
    ]
    row = row_of(numel)
    ranks = {"spreads": [2**31, 0, 2**30][:n], "row": row, "offset": 3 * row}
    selections += [
        {"chances": [2**30 + 999, 2**31, 2**29][:n], "seeds": [5, 6, 7][:n], **ranks},
        {"chances": [2**31, 2**31 + 5, 0][:n], "seeds": [5, 6, 7][:n], **ranks},
    ]
    if name == "trimmed_l1":
        return [(tensors, s) for s in selections]
    factors = {"weights": [-0.25] * n, "factors": [1.0, 1.7, 0.9, 2.0][:n]}
    if name == "task_vector_sum":
        few = (tensors[:1], {"weights": []})
        whole = [(tensors, {"weights": weights, "divisor": d, "scale": s}) for d, s in ((1.0, 1.0), (0.7, 1.3))]
        return [few, *whole, *((tensors, {**factors, **s}) for s in selections[1::2])]
    assert name == "ties", f"tests/kernels/cases.py has no calls of {name}"
    scaled = {**factors, "scale": 0.9, "normalize": False}
    return [(tensors, {**s, **(scaled if i % 2 else {"weights": weights})}) for i, s in enumerate(selections)]


def compare(launch: Launch, name: str, tensors: Tensors, arguments: dict[str, Any], compute: DType) -> None:
    """Fails unless `launch` gives the bits of the reference and leaves the memory around its output alone."""
    op = OPS[name]
    specs = [Spec(tuple(t.shape), dtypes.from_torch(t.dtype)) for t in tensors]
    params = op.check(specs, compute_dtype=compute, **arguments)
    result = op.result(specs, params)
    params.pop("out_dtype", None)
    expected = op.reference(tensors, **params).to(result.dtype.to_torch()).reshape(result.shape)
    out = output(op, result)
    flat = [t.contiguous().view(-1) for t in tensors]
    launch(flat, out[GUARD:-GUARD], **params)
    if name in BOUNDS:
        check_close(out, guarded(op, expected), BOUNDS[name])
    else:
        check_bits(out, guarded(op, expected))


GUARD = 24
STARTS_AT = 5  # what an accumulating op finds in its output


def output(op: Op, result: Spec) -> torch.Tensor:
    """Flat memory for a result, poisoned, between two guards."""
    poison = STARTS_AT if op.accumulates else float("nan")
    return torch.full((result.numel + 2 * GUARD,), poison, dtype=result.dtype.to_torch())


def guarded(op: Op, expected: torch.Tensor) -> torch.Tensor:
    """What :func:`output` has to hold after the call."""
    out = output(op, Spec(tuple(expected.shape), dtypes.from_torch(expected.dtype)))
    inside = out[GUARD:-GUARD]
    inside.copy_(
        expected.reshape(-1) + (STARTS_AT if op.accumulates else 0) if op.accumulates else expected.reshape(-1)
    )
    return out


def check_close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """Equal up to `bound`, relative to values of 1 and more, absolute below; any NaN for a NaN."""
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound * 1e-3, equal_nan=True)


def check_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits; any NaN for a NaN."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    differ = found.view(bits) != expected.view(bits)
    if found.is_floating_point():
        differ &= ~(found.isnan() & expected.isnan())
    where = differ.nonzero()[:5]
    got, want = found[differ][:5].tolist(), expected[differ][:5].tolist()
    assert not len(where), f"at {where.flatten().tolist()}: {got} instead of {want}"
