"""The element-wise kernels on a GPU one by one, Triton and CUDA C++, against a copy there and against plain torch.

The cases are those of ``benchmarks.ops``: an op can do no better than read each input once and write its output once,
at the bandwidth of a copy, and GB/s counts exactly those bytes. One more is a whole method: TIES with its exact
threshold, from the histogram to the output, which has to read everything twice.

``benchmarks/gpu/run.sh ops`` runs this; ``python -m benchmarks.gpu.measure --dry-run`` only says what would be
measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import seme
from benchmarks.checkpoints import BASE_STD, CHANGED, TUNED_STD
from benchmarks.common import MIB, table
from benchmarks.gpu.device import Device, Part, brief, judged
from benchmarks.ops import DENSITY, WEIGHTS, Case, Tensors, cases, threshold, torch_ties

ELEMENTS = 256 * MIB
SMALL = 65537
"""Elements of the call that is compared with the reference."""
SMOKE = 1030
SECONDS = 1.5
"""Of a case, after which no round begins."""
COPY, THRESHOLD = 0.85, 0.6
WHOLE = "TIES 1+3, exact threshold"


def goal(name: str) -> float:
    """The share of the copy's bandwidth that a case should reach: less where a threshold is found or cut exactly."""
    exact = name.endswith(("quota", "threshold")) or name.startswith(
        ("magnitude_histogram", "tie_counts", "trimmed_l1")
    )
    return THRESHOLD if exact else COPY


def make_tensors(elements: int, device: str) -> Tensors:
    """A base and three fine-tunes of it, bfloat16, with the statistics of ``benchmarks.checkpoints``."""
    generator = torch.Generator(device).manual_seed(0)
    base = torch.empty(elements, dtype=torch.bfloat16, device=device).normal_(0, BASE_STD, generator=generator)
    tensors = [base]
    for _ in range(3):
        delta = torch.empty(elements, device=device).normal_(0, TUNED_STD, generator=generator)
        delta.mul_(torch.empty(elements, device=device).uniform_(generator=generator) < CHANGED)
        tensors.append(delta.add_(base).to(torch.bfloat16))
    return tensors


class Whole(Case):
    """The method TIES on one tensor: the inputs are read for the threshold, and again for the output."""

    def bytes(self, elements: int) -> int:
        """Bytes that must be moved, bfloat16."""
        return 2 * elements * (2 * self.inputs + 1)


def exact_ties(tensors: Tensors, *, backend: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """TIES at the density whose threshold the other cases use; ``out`` is not used: the method makes its own."""
    models = [{"w": t} for t in tensors]
    parameters = {"weight": list(WEIGHTS), "density": DENSITY}
    return seme.merge_state_dicts(models, "ties", base=0, parameters=parameters, dtype=torch.bfloat16, backend=backend)[
        "w"
    ]


def torch_exact_ties(tensors: Tensors) -> torch.Tensor:
    """The same in plain torch: a sort for each threshold. Here they are equal, near enough."""
    base, *tuned = tensors
    rank = int(DENSITY * base.numel())
    keys = [int((t - base).abs_().view(torch.int16).sort(descending=True).values[rank]) for t in tuned]
    return torch_ties(tensors, keys[0])


def all_cases(key: int) -> dict[str, Case]:
    """Those of ``benchmarks.ops``, and the whole method."""
    return cases(key) | {WHOLE: Whole(4, True, exact_ties, torch_exact_ties)}


def verify(case: Case, tensors: Tensors, backend: str) -> int:
    """How many results of a small call have other bits than those of plain torch on the CPU."""
    few = [t[:SMALL] for t in tensors[: case.inputs]]
    ours, reference = case.seme(few, backend=backend).cpu(), case.seme([t.cpu() for t in few], backend="torch")
    return int((ours != reference).sum())


def measure(device: Device, case: Case, goal: float, tensors: Tensors, rounds: int, backends: Sequence[str]) -> Any:
    """All providers in turns; an entry of the results file."""
    elements = len(tensors[0])
    tensors = tensors[: case.inputs]
    target = torch.empty_like(tensors[0])
    out = {"out": torch.empty_like(tensors[0])} if case.writes else {}
    checked, failed = {}, {}
    for backend in backends:
        try:
            checked[backend] = verify(case, tensors, backend)
        except Exception as e:
            failed[backend] = brief(e)
            continue
        if checked[backend]:
            failed[backend] = f"{checked[backend]} results differ from the reference"
    right = [b for b in backends if b not in failed]
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(tensors[0]),
        **{backend: lambda backend=backend: case.seme(tensors, backend=backend, **out) for backend in right},
        "torch": lambda: case.torch(tensors),
    }
    calls, more = device.working(calls)
    failed |= more
    stats, samples = device.in_turns(calls, rounds, SECONDS)
    moved = {name: 4 * elements if name == "copy" else case.bytes(elements) for name in stats}
    speed = {name: moved[name] / stats[name]["median"] / 1e9 for name in stats}
    ours = [b for b in right if b in calls]
    return {
        "goal": goal,
        "elements": elements,
        "bytes": case.bytes(elements),
        "checked": checked,
        **({"failed": failed} if failed else {}),
        "seconds": stats,
        "gb_per_s": speed,
        "of_copy": {backend: speed[backend] / speed["copy"] for backend in ours},
        "torch_over": {b: stats["torch"]["median"] / stats[b]["median"] for b in ours if "torch" in stats},
        "peak_mib": {name: device.peak(call) for name, call in calls.items() if name != "copy"},
        "samples": samples,
    }


def report(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of entries of the results file; an entry that failed has no row."""
    found = {name: e for name, e in entries.items() if "of_copy" in e}
    backends = list(dict.fromkeys(b for e in found.values() for b in e["of_copy"]))
    rows = []
    for name, entry in found.items():
        times, speed = entry["seconds"], entry["gb_per_s"]

        def cells(values: Mapping[str, Any], names: Sequence[str], style: Callable[[Any], str]) -> list[str]:
            return [style(values[n]) if n in values else "-" for n in names]

        row = [name, *cells(times, ("copy", *backends, "torch"), lambda s: f"{s['median'] * 1e6:.0f}")]
        row += cells(speed, ("copy", *backends), lambda s: f"{s:.0f}")
        row += cells(entry["of_copy"], backends, lambda x, e=entry: judged(x, e["goal"]))
        rows.append([*row, *cells(entry["peak_mib"], backends, lambda x: f"{x:.0f}"), f"{entry['goal']:.2f}"])
    header = ["op, tensors", *(f"{p} us" for p in ("copy", *backends, "torch"))]
    header += [*(f"{p} GB/s" for p in ("copy", *backends)), *(f"{b} of copy" for b in backends)]
    return table([*header, *(f"{b} MiB" for b in backends), "goal"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure", description="time element-wise kernels")
    parser.add_argument("--elements", type=int, help=f"per tensor; default {ELEMENTS}, more than the L2 cache holds")
    parser.add_argument("--rounds", type=int, help="samples of each provider; default 50")
    part = Part("ops", parser, arguments)
    smoke = part.device.smoke
    elements = part.options.elements or (SMOKE if smoke else ELEMENTS)
    rounds = part.options.rounds or (1 if smoke else 50)
    if part.options.dry_run:
        found = {k: v for k, v in all_cases(0).items() if part.chosen(k)}
        rows = [[k, str(v.inputs), f"{v.bytes(elements) / 1e6:.0f}", f"{goal(k):.2f}"] for k, v in found.items()]
        print(table(["op, tensors", "inputs", "MB", "goal, of copy"], rows))
        return
    part.open()
    tensors = make_tensors(elements, part.device.name)
    for name, case in all_cases(threshold(tensors)).items():
        if part.chosen(name):

            def make(case: Case = case, name: str = name) -> dict[str, Any]:
                return measure(part.device, case, goal(name), tensors, rounds, part.usable())

            part.measure(name, make)
    print(report(part.entries))
    part.close()


if __name__ == "__main__":
    main()
