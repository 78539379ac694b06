"""The GPU kernels one by one, Triton and CUDA C++, against torch's copy on the same GPU and against plain torch.

The kernels with matrix products are in ``benchmarks.gpu.matrix``, and are measured by this program too.

``benchmarks/gpu/run.sh`` builds, tests and then runs this; ``python -m benchmarks.gpu.measure --dry-run`` only says
what would be measured and needs no GPU. The cases are those of ``benchmarks.ops``: an op can do no better than read
each input once and write its output once, at the bandwidth of a copy, and GB/s counts exactly those bytes.

Times are those of CUDA events, so of the GPU alone. Before each sample a copy is queued, for two reasons: it keeps
the GPU busy until the whole sample is queued, and it leaves nothing of the inputs in the L2 cache.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.checkpoints import BASE_STD, CHANGED, TUNED_STD
from benchmarks.common import GIB, MIB, RESULTS, Results, provenance, summarize, table
from benchmarks.gpu import matrix
from benchmarks.ops import Case, Tensors, cases, threshold

ABOUT = {
    "bytes": "what the op must move at least: each input once, the output once (reductions: only the inputs)",
    "seconds": "between two CUDA events, by provider: copy (torch's copy_ of one tensor), triton, cuda, torch",
    "gb_per_s": "bytes / median seconds / 1e9; for the copy: bytes read + bytes written",
    "of_copy": "median GB/s of a provider / median GB/s of the copy in the same rounds",
    "torch_over": "median seconds of plain torch, one operation after the other / median seconds of the provider",
}

ABOUT |= {name: text for name, text in matrix.ABOUT.items() if name not in ABOUT}

ELEMENTS = 256 * MIB
BACKENDS = ("triton", "cuda")


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


def verify(case: Case, tensors: Tensors, backend: str) -> None:
    """The kernel gives the bits that torch gives on the CPU: no number without a right result."""
    few = [t[:65537] for t in tensors[: case.inputs]]
    ours, reference = case.seme(few, backend=backend).cpu(), case.seme([t.cpu() for t in few], backend="torch")
    if not torch.equal(ours, reference):
        wrong = int((ours != reference).sum())
        raise AssertionError(f"{backend}: {wrong} of {ours.numel()} results differ from the reference")


def queue(call: Callable[[], object], before: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Queues `before` and `call`; the events before and after the call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before()
    start.record()
    call()
    end.record()
    return start, end


def measure(case: Case, tensors: Tensors, rounds: int, backends: Sequence[str]) -> dict[str, Any]:
    """All providers in turns, after two rounds that do not count; an entry of the results file."""
    elements = len(tensors[0])
    tensors = tensors[: case.inputs]
    target, other = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
    out = {"out": torch.empty_like(tensors[0])} if case.writes else {}
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(tensors[0]),
        **{backend: lambda backend=backend: case.seme(tensors, backend=backend, **out) for backend in backends},
        "torch": lambda: case.torch(tensors),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-2, rounds):
        events = {name: queue(call, lambda: other.copy_(target)) for name, call in calls.items()}
        torch.cuda.synchronize()
        if number >= 0:
            for name, (start, end) in events.items():
                samples[name].append(round(start.elapsed_time(end) / 1e3, 9))
    stats = {name: summarize(times) for name, times in samples.items()}
    moved = {name: 4 * elements if name == "copy" else case.bytes(elements) for name in stats}
    speed = {name: moved[name] / stats[name]["median"] / 1e9 for name in stats}
    return {
        "elements": elements,
        "bytes": case.bytes(elements),
        "seconds": stats,
        "gb_per_s": speed,
        "of_copy": {backend: speed[backend] / speed["copy"] for backend in backends},
        "torch_over": {backend: stats["torch"]["median"] / stats[backend]["median"] for backend in backends},
        "samples": samples,
    }


def gpu() -> dict[str, Any]:
    """What the numbers were measured on: the current CUDA device and its driver."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / GIB, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / MIB, 1),
        "driver": line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
    }


def line(command: Sequence[str]) -> str | None:
    """The last line a command prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else None


def run_of(commit: str | None) -> dict[str, Any]:
    """Provenance of this run, with the GPU and what compiled for it."""
    import triton

    run = provenance()
    if commit:
        run.update(commit=commit, dirty=None)
    run["versions"] |= {"triton": triton.__version__, "cuda": torch.version.cuda, "nvcc": line(["nvcc", "--version"])}
    run["machine"]["gpu"] = gpu()
    return run


def report(entries: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of entries of the results file."""
    backends = list(next(iter(entries.values()))["of_copy"]) if entries else []
    header = ["op, tensors", *(f"{b} us" for b in (*backends, "torch")), *(f"{b} GB/s" for b in (*backends, "copy"))]
    rows = []
    for name, entry in entries.items():
        times, speed = entry["seconds"], entry["gb_per_s"]
        rows.append([name, *(f"{times[k]['median'] * 1e6:.0f}" for k in (*backends, "torch"))])
        rows[-1] += [f"{speed[k]:.0f}" for k in (*backends, "copy")]
        rows[-1] += [f"{entry['of_copy'][k]:.2f}" for k in backends]
    return table([*header, *(f"{b} of copy" for b in backends)], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure", description="time the GPU kernels")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="beginnings of names; default: all")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="per tensor; more than the L2 cache holds")
    parser.add_argument("--width", type=int, default=4096, help="rows and columns of the weights in matrix products")
    parser.add_argument("--labels", type=int, default=32000, help="bases in matrix products")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--name", help="results go to benchmarks/results/gpu-NAME.json; default: the GPU's name")
    parser.add_argument("--commit", help="commit to write down, where there is no git repository")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured; needs no GPU")
    options = parser.parse_args(arguments)

    def chosen(found: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in found.items() if not options.cases or k.startswith(tuple(options.cases))}

    if options.dry_run:
        rows = [[k, str(v.inputs), f"{v.bytes(options.elements) / 1e6:.0f}"] for k, v in chosen(cases(0)).items()]
        print(table(["op, tensors", "inputs", "MB"], rows))
        found = chosen(matrix.sizes(options.width, options.labels).products())
        rows = [[k, f"{2 * m * n * p / 1e12:.2f}", str(dtype)] for k, (_, (m, n, p), dtype) in found.items()]
        print(table(["op, tensors", "Tflop", "product"], rows))
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu.measure: no CUDA GPU here; --dry-run says what would be measured")
    tensors = make_tensors(options.elements, "cuda")
    run = run_of(options.commit)
    name = options.name or re.sub(
        r"[^a-z0-9]+", "-", run["machine"]["gpu"]["name"].lower().replace("nvidia", "")
    ).strip("-")
    results = Results(RESULTS / f"gpu-{name}.json", run, ABOUT)
    entries = {}
    for key, case in chosen(cases(threshold(tensors))).items():
        for backend in options.backends:
            verify(case, tensors, backend)
        entries[key] = measure(case, tensors, options.rounds, options.backends)
        results.put(key, entries[key])
    print(report(entries))
    models = [t[: options.width**2].view(options.width, options.width) for t in tensors]
    products = {}
    for key, product in chosen(matrix.cases(models, options.labels)).items():
        for backend in matrix.backends_of(product.op, options.backends):
            matrix.verify(product.op, backend)
        products[key] = matrix.measure(product, options.rounds, options.backends, queue)
        results.put(key, products[key])
    print(matrix.report(products))
    print(f"{results.path}: {run['machine']['gpu']['name']}, torch {torch.__version__}, {run['versions']['nvcc']}")


if __name__ == "__main__":
    main()
