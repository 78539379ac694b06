"""Whole merges on a GPU: models in the shape of Llama 3 8B, from the page cache and from disk, against the I/O floor.

A base and a fine-tune of it are written to disk, bfloat16 random weights, with as many of the 32 layers as disk, memory
and time allow; a second fine-tune is the same files again (hard links). Every merge is a process of its own, on the GPU
with each backend and on the CPU, in turns with ``benchmarks/floor.py``, which reads the same files and writes as many
bytes, and with mergekit if that is installed. ``seme`` multiplies matrices and runs on a model of few layers.

``benchmarks/gpu/run.sh merge`` runs this; ``python -m benchmarks.gpu.merge --dry-run`` says what would be done here.
What was running when the time was up is ended; runs that did not fit are named as failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import checkpoints
from benchmarks.checkpoints import Llama
from benchmarks.common import GIB, MIB, ROOT, summarize, table
from benchmarks.gpu.device import Device, Part, brief, judged
from benchmarks.merge import MARGIN, cached, disk_speed, excerpts, mergekit, remove, shards, warm

LLAMA = Llama(vocabulary=128256, hidden=4096, layers=32, intermediate=14336, heads=32, kv_heads=8)
SMOKE = Llama(vocabulary=40, hidden=8, layers=2, intermediate=16, heads=2, kv_heads=1)
LAYERS = (32, 24, 16, 12, 8, 4, 2, 1)
FEW = 2
"""Layers of the model that ``seme`` merges."""
SECONDS = 155
GPU_MEMORY = "8GiB"
BUDGET = 8 * GIB
CHUNK = 4 * MIB
WRITES, READS = 7, 4
"""How often making the large model and the first of its runs, those of linear, write and read as many bytes as it has
(from disk)."""
STARTS = 60.0
"""Seconds that starting their processes takes, about, and the warm-up."""
CLEAN = 5.0
"""Seconds kept for removing files."""
CACHE, DISK = "page cache", "disk"


@dataclass(frozen=True)
class Run:
    """One thing to time: a method (its inputs), where they are, and who does it."""

    method: str
    state: str
    engine: str

    @property
    def entry(self) -> str:
        """The name of the entry it belongs to."""
        return f"{self.method}, {self.state}"


def engines(device: Device) -> dict[str, dict[str, Any]]:
    """The ways a merge is run, with the options of :func:`seme.merge`; a GPU's first."""
    usable = [b for b, reason in device.backends.items() if reason is None]
    if device.smoke:
        return {f"cpu {b}": {"device": "cpu", "backend": b} for b in usable}
    found: dict[str, dict[str, Any]] = {
        f"cuda {b}": {"device": "cuda", "backend": b, "gpu_memory": GPU_MEMORY} for b in usable
    }
    return found | {"cpu": {"device": "cpu"}}


def schedule(engines: Sequence[str], peer: bool) -> list[Run]:
    """What is run in each round, the most telling first."""
    first, *others = engines
    found = []
    for method, state, who in (
        ("linear", CACHE, ("floor", first, engines[-1])),
        ("linear", DISK, ("floor", first)),
        ("seme", CACHE, ("floor", first)),
        ("ties", CACHE, ("floor", *engines)),
        ("linear", CACHE, others[:-1]),
        ("ties", DISK, ("floor", first)),
        ("seme", CACHE, engines[-1:]),  # most of its ops have no CUDA C++ kernel
        *((m, CACHE, ("mergekit",)) for m in ("linear", "ties") if peer),
    ):
        found += [Run(method, state, engine) for engine in who]
    return found


def recipe(method: str, models: Sequence[Path]) -> dict[str, Any]:
    """In the schema that mergekit reads as well; ``models`` are the base and two fine-tunes."""
    base, *tuned = map(str, models)
    if method == "linear":
        found: dict[str, Any] = {"models": [base, tuned[0]], "weights": [0.4, 0.6]}
    else:
        found = {"models": tuned, "weights": [0.6, 0.4]}
    parameters = {"density": 0.2} if method == "ties" else {}
    entries = [
        {"model": m, "parameters": {"weight": w, **parameters}} if method != "seme" else {"model": m}
        for m, w in zip(found["models"], found["weights"], strict=True)
    ]
    recipe = {"merge_method": method, "models": entries, "dtype": "bfloat16"}
    return recipe if method == "linear" else recipe | {"base_model": base}


def inputs(method: str, models: Sequence[Path]) -> list[Path]:
    """The folders that a method reads."""
    return list(models[:2] if method == "linear" else models)


def fits(layers: int, disk: int, memory: int, seconds: float, speed: Mapping[str, float]) -> bool:
    """Whether a model of so many layers can be measured with this disk (bytes free, MB/s), memory and time."""
    size = 2 * replace(LLAMA, layers=layers).parameters
    small = 2 * replace(LLAMA, layers=min(layers, FEW)).parameters
    space = 3 * size + (0 if layers <= FEW else 2 * small) + MARGIN
    took = size * (WRITES / speed["write_mb_s"] + READS / speed["read_mb_s"]) / 1e6 + STARTS
    return space <= disk and 3 * size <= memory and took <= seconds


def available_memory() -> int:
    """Bytes of RAM that the page cache may use."""
    found = re.search(r"^MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def make_models(folder: Path, llama: Llama) -> list[Path]:
    """A base, a fine-tune, and the fine-tune again under another name."""
    pools = checkpoints.Pools(1, seed=0)
    base, tuned, again = (folder / name for name in checkpoints.names(2))
    with ThreadPoolExecutor(2) as pool:  # writing a file lets other threads run
        for done in [pool.submit(checkpoints.write, path, llama, i, pools) for i, path in enumerate((base, tuned))]:
            done.result()
    again.mkdir()
    for file in tuned.iterdir():
        os.link(file, again / file.name)
    return [base, tuned, again]


def evict(files: Sequence[Path]) -> None:
    """Take the files out of the page cache, as far as the system does what it is told."""
    os.sync()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def call(command: Sequence[str], limit: float) -> str:
    """What a command prints; it and what it started are ended after ``limit`` seconds.

    Raises:
        RuntimeError: it failed, with the end of what it said; or it took too long.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {limit:.0f} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {err.strip()[-500:]}")
    return out


class Bench:
    """The models on disk, and the entries as they grow."""

    def __init__(self, part: Part, scratch: Path, large: Llama, small: Llama, deadline: float) -> None:
        self.part, self.scratch, self.deadline = part, scratch, deadline
        self.engines = engines(part.device)
        self.llamas = {"linear": large, "ties": large, "seme": small}
        self.models = {large: make_models(scratch / "models", large)}
        if small != large:
            self.models[small] = make_models(scratch / "few", small)
        self.samples: dict[Run, list[dict[str, Any]]] = {}
        self.failed: dict[Run, str] = {}
        self.longest: dict[Run, float] = {}
        self.excerpts: dict[str, dict[str, Any]] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def folders(self, method: str) -> list[Path]:
        """The base and two fine-tunes that a method merges."""
        return self.models[self.llamas[method]]

    def merges(self, run: Run, out: Path) -> dict[str, Any]:
        """What ``one_merge.py`` is to do."""
        return {
            "recipe": recipe(run.method, self.folders(run.method)),
            "out": str(out),
            "options": self.engines[run.engine],
        }

    def compile(self, runs: Sequence[Run]) -> None:
        """Run every merge once on a tiny model, so that kernels are compiled and libraries in the page cache."""
        tiny = make_models(self.scratch / "tiny", SMOKE)
        merges = [
            {**self.merges(run, self.scratch / f"tiny-{i}"), "recipe": recipe(run.method, tiny)}
            for i, run in enumerate(r for r in runs if r.engine in self.engines and r.state == CACHE)
        ]
        try:
            call(self.command(merges), self.left)
        except RuntimeError as e:
            print(f"warm-up: {brief(e)}", flush=True)
        for path in self.scratch.glob("tiny*"):
            shutil.rmtree(path)

    def command(self, merges: list[dict[str, Any]]) -> list[str]:
        """Merges in a process of their own."""
        return [sys.executable, str(ROOT / "benchmarks" / "gpu" / "one_merge.py"), json.dumps({"merges": merges})]

    def once(self, run: Run) -> dict[str, Any]:
        """One sample."""
        out = self.scratch / "output"
        folders = inputs(run.method, self.folders(run.method))
        files = [file for folder in folders for file in shards(folder)]
        (warm if run.state == CACHE else evict)(files)
        sample: dict[str, Any] = {"cached": round(cached(files), 3)}
        try:
            if run.engine == "floor":
                spec = {
                    "inputs": [[str(f) for f in shards(folder)] for folder in folders],
                    "output": str(out),
                    "bytes": 2 * self.llamas[run.method].parameters,
                    "threads": min(16, len(os.sched_getaffinity(0))),
                    "chunk": CHUNK,
                    "shared": False,
                    "limit": None,
                    "fsync": True,
                }
                found = call([sys.executable, str(ROOT / "benchmarks" / "floor.py"), json.dumps(spec)], self.left)
                return sample | {"seconds": json.loads(found)["fsync_s"]}
            if run.engine == "mergekit":
                config = self.scratch / "config.yaml"
                config.write_text(json.dumps(recipe(run.method, self.folders(run.method))))
                command = [str(mergekit()), str(config), str(out), "--no-copy-tokenizer", "--quiet"]
                command += [] if self.part.device.smoke else ["--cuda"]
                began = time.perf_counter()
                call(command, self.left)
                os.sync()  # mergekit does not
                return sample | {"seconds": time.perf_counter() - began}
            done = json.loads(call(self.command([self.merges(run, out)]), self.left))
            if "error" in done:
                raise RuntimeError(done["error"])
            self.compare(run, out)
            return sample | done
        finally:
            remove(out)
            for path in self.scratch.glob(".output.seme-*"):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def compare(self, run: Run, out: Path) -> None:
        """Share of the values, of the middle of every tensor, that are those of the engine that came first."""
        import numpy as np

        found = excerpts(out)
        first = self.excerpts.setdefault(run.method, {"engine": run.engine, "values": found, "equal": {}})
        equal = [np.mean(found[name] == values) for name, values in first["values"].items()]
        first["equal"][run.engine] = float(np.mean(equal))

    def sample(self, run: Run) -> None:
        """Run it if there is time, and keep the entry it belongs to."""
        began = time.monotonic()
        if self.left < self.longest.get(run, 0.0) * 1.2 or self.left <= CLEAN:
            if run not in self.samples:
                self.failed[run] = "no time left"
        else:
            try:
                self.samples.setdefault(run, []).append(self.once(run))
            except (RuntimeError, OSError) as e:
                self.failed[run] = brief(e)
            self.longest[run] = max(self.longest.get(run, 0.0), time.monotonic() - began)
            took = self.samples[run][-1]["seconds"] if self.samples.get(run) else float("nan")
            print(f"{run.entry}: {run.engine}: {self.failed.get(run) or f'{took:.2f} s'}", flush=True)
        name = run.entry
        self.part.results.put(f"{self.part.name}/{name}", self.entry(name))
        self.part.entries[name] = self.part.results.data["entries"][f"{self.part.name}/{name}"]

    def entry(self, name: str) -> dict[str, Any]:
        """All samples of a method and state so far."""
        samples = {run.engine: found for run, found in self.samples.items() if run.entry == name and found}
        failed = {run.engine: why for run, why in self.failed.items() if run.entry == name}
        method = name.partition(",")[0]
        llama = self.llamas[method]
        stats = {engine: summarize([s["seconds"] for s in found]) for engine, found in samples.items()}
        floor = stats.get("floor", {}).get("median")
        files = [f for folder in inputs(method, self.folders(method)) for f in shards(folder)]
        compared = self.excerpts.get(method, {"engine": None, "equal": {}})

        def most(key: str) -> dict[str, Any]:
            found = {e: [s[key] for s in runs if s.get(key) is not None] for e, runs in samples.items()}
            return {engine: max(values) for engine, values in found.items() if values}

        return {
            "layers": llama.layers,
            "parameters": llama.parameters,
            "input_bytes": sum(f.stat().st_size for f in files),
            "distinct_input_bytes": sum({f.stat().st_ino: f.stat().st_size for f in files}.values()),
            "output_bytes": 2 * llama.parameters,
            "gpu_memory": BUDGET,
            **({"failed": failed} if failed else {}),
            "seconds": stats,
            "over_floor": {e: s["median"] / floor for e, s in stats.items() if e != "floor"} if floor else {},
            "startup_s": most("startup_s"),
            "counted_gpu_bytes": most("counted_gpu_bytes"),
            "peak_gpu_bytes": most("peak_gpu_bytes"),
            "cached": most("cached"),
            "equal_values": {"to": compared["engine"], **compared["equal"]},
            "samples": samples,
        }


def report(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of entries of the results file: a row for each engine."""
    rows = []
    for name, entry in entries.items():
        for engine, stats in entry.get("seconds", {}).items():
            seconds, moved = stats["median"], entry["input_bytes"] + entry["output_bytes"]
            row = [f"{name}, {entry['layers']} layers", engine, f"{seconds:.2f}", f"{moved / seconds / 1e9:.2f}"]
            row.append(f"{entry['over_floor'][engine]:.2f}" if engine in entry["over_floor"] else "-")
            row.append(f"{entry['startup_s'][engine]:.1f}" if engine in entry["startup_s"] else "-")
            peak = entry["peak_gpu_bytes"].get(engine)
            budget = entry["gpu_memory"] / GIB
            row.append("-" if peak is None else judged(peak / GIB, budget, at_most=True))
            equal = entry["equal_values"].get(engine)
            row.append("-" if equal is None else f"{equal:.2%}")
            rows.append([*row, str(stats["samples"])])
    header = ["merge, inputs from", "engine", "s", "GB/s", "x floor", "start-up s", "GPU GiB", "same values", "runs"]
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.merge", description="time whole merges on a GPU")
    parser.add_argument("--dir", type=Path, help="folder for a folder of models and outputs; default: build/gpu")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of it; default {SECONDS}")
    parser.add_argument("--layers", type=int, choices=LAYERS, help="of the model; default: as many as fit")
    part = Part("merge", parser, arguments)
    options, smoke = part.options, part.device.smoke
    deadline = time.monotonic() + options.seconds - CLEAN
    scratch = (options.dir or ROOT / "build" / "gpu").resolve() / "merges"
    if options.dry_run:
        free, memory = (
            shutil.disk_usage(next(p for p in (scratch, *scratch.parents) if p.exists())).free,
            available_memory(),
        )
        speed = {"write_mb_s": 2000, "read_mb_s": 2000}
        layers = next((n for n in LAYERS if fits(n, free, memory, options.seconds, speed)), None)
        print(
            f"{free / GIB:.0f} GiB of disk, {memory / GIB:.0f} GiB of memory: {layers} layers, if the disk moves 2 GB/s"
        )
        runs = schedule(["cuda triton", "cuda cuda", "cpu"], mergekit() is not None)
        print(table(["merge, inputs from", "engine"], [[r.entry, r.engine] for r in runs if part.chosen(r.entry)]))
        return
    part.open()
    scratch.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is on disk is removed
    try:
        if smoke:
            large = small = SMOKE
        else:
            part.results.run["machine"]["disk"] = speed = disk_speed(scratch)
            free, memory = shutil.disk_usage(scratch).free, available_memory()
            found = [n for n in LAYERS if fits(n, free, memory, deadline - time.monotonic(), speed)]
            layers = options.layers or (found or [LAYERS[-1]])[0]
            large, small = (replace(LLAMA, layers=n) for n in (layers, min(layers, FEW)))
            print(f"{layers} layers, {large.parameters / 1e9:.1f} B weights; {speed}", flush=True)
        bench = Bench(part, scratch, large, small, deadline)
        runs = [r for r in schedule(list(bench.engines), mergekit() is not None and not smoke) if part.chosen(r.entry)]
        bench.compile(runs)
        for _ in range(1 if smoke else 5):
            for run in runs:
                if run not in bench.failed:
                    bench.sample(run)
    finally:
        shutil.rmtree(scratch)
    print(report(part.entries))
    part.failed = [f"{r.entry}, {r.engine}: {why}" for r, why in bench.failed.items() if why != "no time left"]
    part.close()


if __name__ == "__main__":
    main()
