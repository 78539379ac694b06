"""The device that is measured: its clock, its memory, and what is written down about it.

On a GPU times are those of CUDA events, so of the GPU alone. Before each sample copies are queued, for two reasons:
they keep the GPU busy until the whole sample is queued, and they leave nothing of the operands in the L2 cache.
With ``--smoke`` the device is the CPU, the clock the wall clock, and the kernels run in Triton's interpreter: the same
programs on tiny operands, to see that they work where there is no GPU. Such times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.common import GIB, MIB, RESULTS, Results, provenance, seconds, summarize

ABOUT = {
    "seconds": "between two CUDA events, by provider; of merges: wall time",
    "checked": "by backend: the largest distance from the reference on a small call in the same run; of element-wise "
    "ops how many of the results have other bits than those of the CPU, of matrix ops |found - exact| / |exact|",
    "failed": "by backend: why it has no number",
    "error": "why there is no number at all",
    "peak_mib": "memory that a call allocates beyond its operands at its peak, its results included, by provider",
    "goal": "what the ratio of the entry's kind has to reach (of_copy, of_product), or its seconds must not pass",
    "bytes": "what the op must move at least: each input once, the output once (reductions: only the inputs; TIES "
    "with an exact threshold: the inputs twice)",
    "gb_per_s": "bytes / median seconds / 1e9; for the copy: bytes read + bytes written",
    "of_copy": "median GB/s of a provider / median GB/s of the copy in the same rounds",
    "flops": "multiplications and additions of the op's definition; half of a plain product for symmetric results",
    "product": "[m, k, n] and dtype of the product of as many flops (torch.mm) that is timed in the same rounds",
    "tflops": "flops / median seconds / 1e12, by provider: product (cuBLAS), triton, cuda, torch",
    "of_product": "median rate of a provider / median rate of the product",
    "torch_over": "median seconds of plain torch, one operation after the other / median seconds of the provider",
    "over_floor": "of merges: median seconds / median seconds of the I/O floor with the same inputs and state of the "
    "page cache in the same run; start-up of the process not counted in either (of mergekit it is counted)",
    "startup_s": "of merges: imports, and the first contact with the GPU",
    "counted_gpu_bytes": "of merges: the most that the merge counted towards its limit, gpu_memory",
    "peak_gpu_bytes": "of merges: the most that torch's allocator held",
    "cached": "of merges: share of the inputs' bytes in the page cache before the run",
}

RESTART = 3
"""Exit code of a part that ran into an error after which a process can do nothing more on its GPU."""
ENOUGH = 5
"""Samples that are taken even if they take longer than they should."""
FLUSH = 512 * MIB
FLUSHES = 3


@dataclass(frozen=True)
class Device:
    """What is measured: ``cuda``, or the ``cpu`` in a smoke run."""

    name: str

    @property
    def smoke(self) -> bool:
        """Whether times mean nothing."""
        return self.name == "cpu"

    @cached_property
    def backends(self) -> dict[str, str | None]:
        """The backends that are measured, each with the reason why it does not work here, or None."""
        from seme.ops._op import why_not

        return {b: why_not(b, self.name) for b in (("triton", "cpu") if self.smoke else ("triton", "cuda"))}

    @cached_property
    def _flush(self) -> list[Any]:
        import torch

        return [torch.zeros(FLUSH, dtype=torch.uint8, device=self.name) for _ in range(2)]

    def synchronize(self) -> None:
        """Wait for all that was queued."""
        import torch

        if not self.smoke:
            torch.cuda.synchronize()

    def time(self, call: Callable[[], object]) -> Callable[[], float]:
        """Queue the call; what is returned gives its seconds, once the device has caught up."""
        import torch

        if self.smoke:
            took = seconds(call)
            return lambda: took
        source, target = self._flush
        for _ in range(FLUSHES):
            target.copy_(source)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3

    def in_turns(
        self, calls: Mapping[str, Callable[[], object]], rounds: int, limit: float
    ) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
        """All calls in turns: statistics and samples, in seconds. They have been run before (:meth:`working`).

        After ``limit`` seconds no round begins, if there are enough.
        """
        samples: dict[str, list[float]] = {name: [] for name in calls}
        began = time.perf_counter()
        for number in range(rounds):
            if number >= ENOUGH and time.perf_counter() - began > limit:
                break
            taken = {name: self.time(call) for name, call in calls.items()}
            self.synchronize()
            for name, took in taken.items():
                samples[name].append(round(took(), 9))
        return {name: summarize(times) for name, times in samples.items()}, samples

    def working(
        self, calls: Mapping[str, Callable[[], object]]
    ) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
        """Those of the calls that do not fail, each run once, and why the others do."""
        found, failed = {}, {}
        for name, call in calls.items():
            try:
                call()
                self.synchronize()
                found[name] = call
            except Exception as e:
                failed[name] = brief(e)
        return found, failed

    def peak(self, call: Callable[[], object]) -> float:
        """MiB that a call allocates at its peak."""
        import torch

        if self.smoke:
            from benchmarks.matrix import peak

            return peak(call)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)

    def release(self) -> None:
        """Give what torch holds back to the GPU."""
        import torch

        if not self.smoke:
            torch.cuda.empty_cache()

    def broken(self) -> bool:
        """Whether an error has left this process without a GPU."""
        try:
            self.synchronize()
        except RuntimeError:
            return True
        return False


def line(command: Sequence[str]) -> str | None:
    """The last line a command prints; None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else None


def gpu() -> dict[str, Any]:
    """What the numbers were measured on: the current CUDA device and its driver."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / GIB, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / MIB, 1),
        "driver": line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
    }


def run_of(device: Device) -> dict[str, Any]:
    """Provenance of a run, with the GPU and what compiles for it. ``SEME_COMMIT`` says the commit where git cannot."""
    import torch

    run = provenance()
    if commit := os.environ.get("SEME_COMMIT"):
        run.update(commit=commit, dirty=None)
    try:
        import triton

        run["versions"]["triton"] = triton.__version__
    except ImportError:
        run["versions"]["triton"] = None
    run["versions"] |= {"cuda": torch.version.cuda, "nvcc": line(["nvcc", "--version"])}
    run["machine"]["gpu"] = {"name": "smoke"} if device.smoke else gpu()
    return run


def place(run: Mapping[str, Any], folder: Path | None = None) -> Path:
    """``gpu-NAME.json`` of the run's GPU in ``folder``: by default ``OUT``, or where results are kept."""
    name = re.sub(r"[^a-z0-9]+", "-", run["machine"]["gpu"]["name"].lower().replace("nvidia", "")).strip("-")
    return (folder or Path(os.environ.get("OUT") or RESULTS)) / f"gpu-{name}.json"


class Part:
    """One part of the benchmark: its options, its device and the results it adds to.

    Entries that the same run has already are not measured again, so that a part that lost its GPU can be started anew.
    """

    def __init__(self, name: str, parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> None:
        parser.add_argument("--smoke", action="store_true", help="on the CPU with tiny sizes: does it work?")
        parser.add_argument("--cases", nargs="+", metavar="NAME", help="beginnings of names; default: all")
        parser.add_argument("--run", type=Path, help="JSON: the run that this is part of; default: a new one")
        parser.add_argument(
            "--out", type=Path, help="results file; default: gpu-NAME.json of the GPU in OUT or results/"
        )
        parser.add_argument("--dry-run", action="store_true", help="say what would be measured; needs no GPU")
        self.options = parser.parse_args(arguments)
        self.name = name
        self.device = Device("cpu" if self.options.smoke else "cuda")
        if self.device.smoke:
            os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        self.failed: list[str] = []
        self.entries: dict[str, dict[str, Any]] = {}

    def open(self) -> None:
        """Look for the device and open the results file."""
        import torch

        if not self.device.smoke and not torch.cuda.is_available():
            raise SystemExit(f"benchmarks.gpu.{self.name}: no CUDA GPU here; --dry-run says what would be measured")
        file = self.options.run
        run = json.loads(file.read_text()) if file else run_of(self.device)
        self.results = Results(self.options.out or place(run), run, ABOUT)

    def chosen(self, name: str) -> bool:
        """Whether a case is asked for."""
        return not self.options.cases or name.startswith(tuple(self.options.cases))

    def usable(self) -> list[str]:
        """The backends that work here."""
        return [name for name, reason in self.device.backends.items() if reason is None]

    def measure(self, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """Keep what ``make`` measures under ``PART/NAME``, or why it did not."""
        key = f"{self.name}/{name}"
        old = self.results.get(key)
        if old is None or old["run"] != self.results.run["date"]:
            self.results.put(key, {"error": "the process ended, or was ended, while this was measured"})
            try:
                entry = make()
            except Exception as e:
                entry = {"error": brief(e)}
            self.results.put(key, entry)
            if self.device.broken():
                print(f"{key}: {entry.get('error') or entry.get('failed')}", flush=True)
                sys.exit(RESTART)
            self.device.release()
        self.entries[name] = self.results.data["entries"][key]
        wrong = self.entries[name].get("error") or self.entries[name].get("failed")
        if wrong:
            self.failed.append(f"{key}: {wrong}")
        print(f"{key}: {wrong or 'measured'}", flush=True)

    def close(self) -> None:
        """Exit code 1 if something could not be measured."""
        if self.failed:
            sys.exit("\n".join(self.failed))


def brief(error: BaseException) -> str:
    """An exception in a line or a few."""
    return f"{type(error).__name__}: {str(error)[:600]}"


def judged(value: float, goal: float | None, style: str = "{:.2f}", at_most: bool = False) -> str:
    """A number beside its goal, as tables show it."""
    if goal is None:
        return style.format(value)
    return f"{style.format(value)} {'pass' if (value <= goal if at_most else value >= goal) else 'MISS'}"
