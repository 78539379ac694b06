"""The ops one by one, against the copy bandwidth of the machine and against the same formula in plain torch.

``python -m benchmarks.ops`` times every case, interleaved with a copy and with torch, and keeps the medians;
``python -m pytest benchmarks/test_ops.py`` runs the same cases under pytest-benchmark.

All cases are memory-bound when done well: an op can do no better than read each input once and write its output
once, at the bandwidth of a copy. GB/s counts exactly those bytes, whatever an implementation really moves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import BASE_STD, CHANGED, TUNED_STD
from benchmarks.common import MIB, RESULTS, Results, in_turns, provenance, table
from seme import ops

ABOUT = {
    "bytes": "what the op must move at least: each input once, the output once (reductions: only the inputs)",
    "gb_per_s": "bytes / median seconds / 1e9; for the copy: bytes read + bytes written",
    "of_copy": "median GB/s of the op / median GB/s of torch's copy_ in the same rounds, same threads",
    "torch_over_seme": "median seconds of plain torch, one operation after the other / median seconds of seme",
}

ELEMENTS = 64 * MIB
DENSITY = 0.2
EPSILON = 0.15
WEIGHTS = (0.4, 0.35, 0.25)
ALL = 1 << 62
NARROW = 21
ROW = 4096
OUTLIER = 128
"""Twice the threshold, in steps of the bfloat16 key."""
CHANGE = 1e-3
"""What counts as a change of an element, in ``ram``."""
VARIANCE = 0x3606
"""The key of the bfloat16 number 2e-6: about a fifth of the elements vary more."""

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One op on given inputs.

    Attributes:
        inputs: number of tensors read; the first is the base where the op has one.
        writes: the result is a tensor of the inputs' size, else a few numbers.
        seme: ``seme(tensors, **options)``, options being ``out`` (if it writes), ``threads``, ``backend``.
        torch: the same in plain torch, as one would write it by hand.
        bound: relative error to which backends agree; 0: to the bit.
    """

    inputs: int
    writes: bool
    seme: Callable[..., torch.Tensor]
    torch: Callable[[Tensors], Any]
    bound: float = 0.0

    def bytes(self, elements: int) -> int:
        """Bytes that must be moved, bfloat16."""
        return 2 * elements * (self.inputs + self.writes)


def make_tensors(elements: int) -> Tensors:
    """A base and three fine-tunes of it, bfloat16, with the statistics of ``benchmarks.checkpoints``."""
    generator = torch.Generator().manual_seed(0)
    base = torch.empty(elements, dtype=torch.bfloat16).normal_(0, BASE_STD, generator=generator)
    tensors = [base]
    for _ in range(3):
        delta = torch.empty(elements).normal_(0, TUNED_STD, generator=generator)
        delta.mul_(torch.empty(elements).uniform_(generator=generator) < CHANGED)
        tensors.append(delta.add_(base).to(torch.bfloat16))
    return tensors


def threshold(tensors: Tensors) -> int:
    """The key (bits of the bfloat16 magnitude) at which about :data:`DENSITY` of a task vector is kept."""
    delta = (tensors[1][:MIB] - tensors[0][:MIB]).abs()
    return int(delta.view(torch.int16).sort(descending=True).values[int(DENSITY * len(delta))])


def magnitude(key: int) -> float:
    """The bfloat16 value with these bits."""
    return torch.tensor(key, dtype=torch.int16).view(torch.bfloat16).item()


def torch_weighted_sum(tensors: Tensors) -> torch.Tensor:
    """Sum held in float32, one rounding at the end."""
    total = tensors[0].float().mul_(WEIGHTS[0])
    for tensor, weight in zip(tensors[1:], WEIGHTS[1:], strict=False):
        total.add_(tensor, alpha=weight)
    return total.to(torch.bfloat16)


def torch_task_vector_sum(tensors: Tensors) -> torch.Tensor:
    """In bfloat16 throughout."""
    base, *tuned = tensors
    total = (tuned[0] - base).mul_(WEIGHTS[0])
    for tensor, weight in zip(tuned[1:], WEIGHTS[1:], strict=True):
        total.add_(tensor - base, alpha=weight)
    return total.add_(base)


def torch_ties(tensors: Tensors, key: int) -> torch.Tensor:
    """Trim by a known threshold, weigh, elect signs, mean of those that agree; in bfloat16."""
    base, *tuned = tensors
    smallest = magnitude(key)
    parts = []
    for tensor, weight in zip(tuned, WEIGHTS, strict=True):
        delta = tensor - base
        parts.append(delta.mul_(delta.abs() >= smallest).mul_(weight))
    positive = sum(parts[1:], parts[0]) >= 0
    total, share = torch.zeros_like(base), torch.zeros_like(base)
    for part, weight in zip(parts, WEIGHTS, strict=True):
        agrees = torch.where(positive, part > 0, part < 0)
        total.addcmul_(part, agrees)
        share.add_(agrees, alpha=weight)
    share.masked_fill_(share == 0, 1)
    return total.div_(share).add_(base)


def torch_band_sum(tensors: Tensors, key: int) -> torch.Tensor:
    """Sum of the parts of task vectors between two known thresholds, in bfloat16."""
    base, *tuned = tensors
    smallest, outlier = magnitude(key), magnitude(key + OUTLIER)
    total = base.clone()
    for tensor, weight in zip(tuned, WEIGHTS, strict=True):
        delta = tensor - base
        size = delta.abs()
        total.add_(delta.mul_((size >= smallest) & (size < outlier)), alpha=weight)
    return total


def torch_dare(tensors: Tensors) -> torch.Tensor:
    """Sum of random parts of task vectors, in bfloat16."""
    base, *tuned = tensors
    total = base.clone()
    for tensor, weight in zip(tuned, WEIGHTS, strict=True):
        total.add_((tensor - base).mul_(torch.empty_like(base).bernoulli_(DENSITY)), alpha=weight)
    return total


def torch_della(tensors: Tensors) -> torch.Tensor:
    """Sum of random parts of task vectors, by rank in rows, in bfloat16."""
    base, *tuned = tensors
    total, n = base.clone(), row(tensors)
    for tensor, weight in zip(tuned, WEIGHTS, strict=True):
        delta = tensor - base
        ranks = delta.abs().view(-1, n).argsort(1).argsort(1).to(torch.bfloat16)
        mask = (DENSITY - EPSILON + 2 * EPSILON * ranks / (n - 1)).bernoulli()
        total.add_(delta.mul_(mask.view(-1)), alpha=weight)
    return total


def torch_inner_products(tensors: Tensors) -> torch.Tensor:
    """Gram matrix in float32."""
    stacked = torch.stack([t.float() for t in tensors])
    return stacked @ stacked.T


def torch_line_products(tensors: Tensors) -> Tensors:
    """Per row of 4096 elements the Gram matrix in float32."""
    rows = [t.float().view(-1, ROW) for t in tensors]
    return [(a * b).sum(1) for i, a in enumerate(rows) for b in rows[i:]]


def row(tensors: Tensors) -> int:
    """Elements of a row, of which there are whole ones."""
    return ROW if len(tensors[0]) % ROW == 0 else len(tensors[0])


def per_row(tensors: Tensors) -> dict[str, Any]:
    """The same weights for every row."""
    return {"weights": [*WEIGHTS] * (len(tensors[0]) // row(tensors)), "row": row(tensors)}


def torch_line_sum(tensors: Tensors) -> torch.Tensor:
    """Weights per row, sum held in float32."""
    weights = torch.tensor(WEIGHTS).repeat(len(tensors[0]) // ROW, 1)
    total = tensors[0].view(-1, ROW).float().mul_(weights[:, :1])
    for i, tensor in enumerate(tensors[1:], 1):
        total.addcmul_(tensor.view(-1, ROW).float(), weights[:, i : i + 1])
    return total.to(torch.bfloat16)


def torch_nearswap(tensors: Tensors) -> torch.Tensor:
    """In bfloat16 throughout."""
    base, other = tensors
    share = (base - other).abs_().clamp_(min=1e-6).reciprocal_().mul_(0.001).clamp_(0, 1)
    return share * other + (1 - share) * base


def torch_magnitude_histogram(tensors: Tensors) -> Tensors:
    """Count of every bfloat16 magnitude."""
    base, *tuned = tensors
    return [torch.bincount((t - base).abs_().view(torch.int16).to(torch.int32), minlength=1 << 15) for t in tuned]


def torch_narrow_histogram(tensors: Tensors, lowest: int) -> Tensors:
    """Counts of float32 magnitudes in 65536 bins from ``lowest`` on, and of those below and above."""
    base, *tuned = tensors
    base = base.float()
    counts = []
    for tensor in tuned:
        bins = tensor.float().sub_(base).abs_().view(torch.int32).sub_(lowest) >> (NARROW - 16)
        counts.append(torch.bincount(bins.clamp_(-1, 65536).add_(1), minlength=65538))
    return counts


def torch_tie_counts(tensors: Tensors, key: int) -> Tensors:
    """How many entries of each task vector lie on the threshold."""
    base, *tuned = tensors
    return [((t - base).abs_() == magnitude(key)).sum() for t in tuned]


def torch_trimmed_l1(tensors: Tensors, key: int) -> Tensors:
    """L1 norm of each task vector before and after the trim."""
    base, *tuned = tensors
    sums = []
    for tensor in tuned:
        delta = (tensor - base).abs_()
        sums += [delta.sum(dtype=torch.float32), delta.mul_(delta >= magnitude(key)).sum(dtype=torch.float32)]
    return sums


def torch_nonfinite(tensors: Tensors) -> Tensors:
    """Count of inf and NaN."""
    return [tensor.isfinite().logical_not_().sum() for tensor in tensors]


def torch_variance(tensors: Tensors) -> torch.Tensor:
    """Variance over the task vectors, in bfloat16."""
    base, *tuned = tensors
    return torch.stack([t - base for t in tuned]).var(0, unbiased=False)


def torch_sce(tensors: Tensors) -> torch.Tensor:
    """Elect signs, mean of those that agree by known coefficients; in bfloat16."""
    base, *tuned = tensors
    deltas = [t - base for t in tuned]
    positive = sum(deltas[1:], deltas[0]) >= 0
    total, share = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight in zip(deltas, WEIGHTS, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        total.add_(delta.mul_(agrees), alpha=weight)
        share.add_(agrees, alpha=weight)
    return total.div_(share.clamp_(min=1e-6)).add_(base)


def torch_changes(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Task vectors, and where they change the base."""
    base, *tuned = tensors
    deltas = [t - base for t in tuned]
    return deltas, [delta.abs() > CHANGE for delta in deltas]


def torch_ram(tensors: Tensors) -> torch.Tensor:
    """Mean over the models that change an element; in bfloat16."""
    deltas, masks = torch_changes(tensors)
    count = sum(masks[1:], masks[0].to(torch.uint8)).clamp_(min=1)
    total = torch.zeros_like(tensors[0])
    for delta, mask in zip(deltas, masks, strict=True):
        total.add_(delta.mul_(mask).div_(count))
    return total.add_(tensors[0])


def torch_overlap_counts(tensors: Tensors) -> Tensors:
    """How many changed elements others change as well."""
    _, masks = torch_changes(tensors)
    several = sum(masks[1:], masks[0].to(torch.uint8)) > 1
    return [(mask & several).sum() for mask in masks]


def whole_rows(tensors: Tensors) -> Tensors:
    """The base and one other tensor, as far as they are whole rows."""
    return [t[: len(t) // ROW * ROW] for t in tensors[:2]]


def factors(tensors: Tensors) -> list[float]:
    """One factor per row."""
    return [2.0] * (len(tensors[0]) // ROW)


def torch_row_divergence(tensors: Tensors) -> torch.Tensor:
    """Divergence of the softmax of rows, in float32."""
    q, p = (torch.softmax(t.view(-1, ROW).float(), dim=-1).add_(1e-8) for t in tensors)
    return (p * torch.log(p / q)).sum(1)


def torch_importance(tensors: Tensors) -> torch.Tensor:
    """Importance of every element, in bfloat16."""
    return (tensors[1] - tensors[0]).abs_().view(-1, ROW).mul_(2.0)


def torch_importance_fusion(tensors: Tensors) -> torch.Tensor:
    """The base, and the other tensor where it is important."""
    keep = torch_importance(tensors).view(-1) >= 0.004
    return (tensors[1] - tensors[0]).mul_(keep).add_(tensors[0])


def cases(key: int) -> dict[str, Case]:
    """All cases; ``key`` is the threshold that the trimming ones use."""
    three = [key] * 3
    # In float32 the keys do not all fit: a window of 2^NARROW of them, with the threshold in its middle.
    lowest = (key << 16) - (1 << NARROW >> 1)

    random = {"chances": [round(DENSITY * 2**32)] * 3, "seeds": [1, 2, 3]}

    lowest_chance, spread = round((DENSITY - EPSILON) * 2**32), round(2 * EPSILON * 2**32)
    ranked = {"chances": [lowest_chance] * 3, "seeds": [1, 2, 3], "spreads": [spread] * 3}

    def by_rank(t: Tensors, **o: Any) -> torch.Tensor:
        return bf16(ops.task_vector_sum, WEIGHTS, **ranked, row=row(t))(t, **o)

    # About one element in a hundred lies on the threshold; a quota of one in a thousand cuts among them.
    def ties_with_quota(t: Tensors, **o: Any) -> torch.Tensor:
        return bf16(ops.ties, WEIGHTS, thresholds=three, tie_quotas=[len(t[0]) // 1000] * 3)(t, **o)

    def bf16(op: Callable[..., torch.Tensor], *positional: Any, **keywords: Any) -> Callable[..., torch.Tensor]:
        return lambda t, **o: op(t[0], t[1:], *positional, compute_dtype=torch.bfloat16, **keywords, **o)

    return {
        "weighted_sum 3": Case(3, True, lambda t, **o: ops.weighted_sum(t, WEIGHTS, **o), torch_weighted_sum),
        "weighted_sum 2": Case(2, True, lambda t, **o: ops.weighted_sum(t, WEIGHTS[:2], **o), torch_weighted_sum),
        "task_vector_sum 1+3": Case(4, True, bf16(ops.task_vector_sum, WEIGHTS), torch_task_vector_sum),
        "task_vector_sum 1+3, band": Case(
            4,
            True,
            bf16(
                ops.task_vector_sum,
                WEIGHTS,
                thresholds=[*three, *[key + OUTLIER] * 3],
                tie_quotas=[*[ALL] * 3, *[0] * 3],
            ),
            lambda t: torch_band_sum(t, key),
        ),
        "task_vector_sum 1+3, random": Case(4, True, bf16(ops.task_vector_sum, WEIGHTS, **random), torch_dare),
        "task_vector_sum 1+3, by rank": Case(4, True, by_rank, torch_della),
        "ties 1+3": Case(
            4,
            True,
            bf16(ops.ties, WEIGHTS, thresholds=three, tie_quotas=[ALL] * 3),
            lambda t: torch_ties(t, key),
        ),
        "ties 1+3, quota": Case(4, True, ties_with_quota, lambda t: torch_ties(t, key)),
        "inner_products 2": Case(2, False, lambda t, **o: ops.inner_products(t, **o), torch_inner_products),
        "line_products 2": Case(2, False, lambda t, **o: ops.line_products(t, row=row(t), **o), torch_line_products),
        "line_sum 3": Case(3, True, lambda t, **o: ops.line_sum(t, **per_row(t), **o), torch_line_sum),
        "nearswap 1+1": Case(2, True, bf16(ops.nearswap, 0.001), torch_nearswap),
        "magnitude_histogram 1+3": Case(
            4,
            False,
            bf16(ops.magnitude_histogram, lowest=[0] * 3, shift=[0] * 3),
            torch_magnitude_histogram,
        ),
        "magnitude_histogram 1+3, narrow": Case(
            4,
            False,
            lambda t, **o: ops.magnitude_histogram(t[0], t[1:], lowest=[lowest] * 3, shift=[NARROW - 16] * 3, **o),
            lambda t: torch_narrow_histogram(t, lowest),
        ),
        "tie_counts 1+3": Case(4, False, bf16(ops.tie_counts, thresholds=three), lambda t: torch_tie_counts(t, key)),
        "trimmed_l1 1+3": Case(
            4,
            False,
            bf16(ops.trimmed_l1, thresholds=three, tie_quotas=[ALL] * 3),
            lambda t: torch_trimmed_l1(t, key),
        ),
        "sce 1+3": Case(
            4,
            True,
            bf16(ops.sce, WEIGHTS, thresholds=[0], tie_quotas=[ALL]),
            torch_sce,
        ),
        "sce 1+3, selection": Case(
            4,
            True,
            bf16(ops.sce, WEIGHTS, thresholds=[VARIANCE], tie_quotas=[ALL]),
            lambda t: (torch_variance(t), torch_sce(t)),
        ),
        "selected_squares 1+3": Case(
            4,
            False,
            bf16(ops.selected_squares, thresholds=[VARIANCE], tie_quotas=[ALL]),
            lambda t: (torch_variance(t), [(x - t[0]).square_().sum() for x in t[1:]]),
        ),
        "variance_histogram 1+3": Case(4, False, bf16(ops.variance_histogram, lowest=0, shift=0), torch_variance),
        "variance_ties 1+3": Case(4, False, bf16(ops.variance_ties, thresholds=[VARIANCE]), torch_variance),
        "ram 1+3": Case(4, True, bf16(ops.ram, [1.0] * 3, epsilon=CHANGE), torch_ram),
        "overlap_counts 1+3": Case(4, False, bf16(ops.overlap_counts, epsilon=CHANGE), torch_overlap_counts),
        "row_divergence 1+1": Case(
            2,
            False,
            lambda t, **o: ops.row_divergence(*whole_rows(t), row=ROW, **o),
            torch_row_divergence,
            bound=1e-12,
        ),
        "importance_histogram 1+1": Case(
            2,
            False,
            lambda t, **o: ops.importance_histogram(*whole_rows(t), factors(t), row=ROW, lowest=[0], shift=[15], **o),
            torch_importance,
        ),
        "importance_fusion 1+1": Case(
            2,
            True,
            lambda t, **o: ops.importance_fusion(*whole_rows(t), factors(t), row=ROW, threshold=0.004, **o),
            torch_importance_fusion,
        ),
        "nonfinite 1": Case(1, False, lambda t, **o: ops.nonfinite(t, **o), torch_nonfinite),
    }


def verify(case: Case, tensors: Tensors) -> None:
    """The kernel gives the bits of the reference on an odd number of elements: no number without a right result."""
    few = [t[:65537] for t in tensors]
    ours, reference = case.seme(few, threads=2, backend="cpu"), case.seme(few, backend="torch")
    if case.bound:
        torch.testing.assert_close(ours, reference, rtol=case.bound, atol=1e-14)  # of terms that cancel
    elif not torch.equal(ours, reference):
        raise AssertionError(f"{int((ours != reference).sum())} of {ours.numel()} results differ from the reference")


def runner(case: Case, tensors: Tensors, threads: int) -> Callable[[], object]:
    """A call of the case that writes into memory it has written to before."""
    if not case.writes:
        return lambda: case.seme(tensors, threads=threads)
    out = torch.zeros_like(tensors[0])
    return lambda: case.seme(tensors, threads=threads, out=out)


def measure(case: Case, tensors: Tensors, rounds: int, threads: int) -> dict[str, Any]:
    """Copy, seme and torch in turns, after one round that does not count; an entry of the results file."""
    elements = len(tensors[0])
    tensors = tensors[: case.inputs]
    target = torch.zeros_like(tensors[0])
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(tensors[0]),
        "seme": runner(case, tensors, threads),
        "torch": lambda: case.torch(tensors),
    }
    stats, samples = in_turns(calls, rounds)
    moved = {"copy": 4 * elements, "seme": case.bytes(elements), "torch": case.bytes(elements)}
    speed = {name: moved[name] / stats[name]["median"] / 1e9 for name in stats}
    return {
        "elements": elements,
        "threads": threads,
        "bytes": case.bytes(elements),
        "seconds": stats,
        "gb_per_s": speed,
        "of_copy": speed["seme"] / speed["copy"],
        "torch_over_seme": stats["torch"]["median"] / stats["seme"]["median"],
        "samples": samples,
    }


def report(entries: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of entries of the results file."""
    rows = []
    for name, entry in entries.items():
        speed = entry["gb_per_s"]
        rows.append([name, *(f"{entry['seconds'][k]['median'] * 1e3:.1f}" for k in ("seme", "torch"))])
        rows[-1] += [f"{speed['seme']:.1f}", f"{speed['copy']:.1f}", f"{entry['of_copy']:.2f}"]
        rows[-1].append(f"{entry['torch_over_seme']:.1f}x")
    return table(["op, tensors", "seme ms", "torch ms", "GB/s", "copy GB/s", "of copy", "faster than torch"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description="time the CPU kernels")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="beginnings of names; default: all")
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "ops-cpu.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tensors = make_tensors(options.elements)
    results = Results(options.out, provenance(), ABOUT)
    chosen = {}
    for name, case in cases(threshold(tensors)).items():
        if options.cases and not name.startswith(tuple(options.cases)):
            continue
        verify(case, tensors[: case.inputs])
        chosen[name] = measure(case, tensors, options.rounds, options.threads)
        results.put(name, chosen[name])
        print(f"{name}: {chosen[name]['gb_per_s']['seme']:.1f} GB/s", flush=True)
    print(report(chosen))


if __name__ == "__main__":
    main()
