"""Whole merges, timed as a user runs them, against the I/O floor and against mergekit.

``python -m benchmarks.merge --sizes 0.43b 1.5b`` makes random-weight checkpoints, and for every size and method
runs, interleaved: the floor (``floor.py``: the same files read once and as many bytes written, nothing else),
``python -m seme merge`` and ``mergekit-yaml``, each as a process of its own, start-up included, with the same
number of threads and the inputs in the page cache. Entries are added to the results file, one per size and method.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import checkpoints
from benchmarks.common import GIB, MIB, RESULTS, ROOT, Results, provenance, summarize, table

ABOUT = {
    "floor": "reading every input of the method once into a reused buffer and writing an output of that size, same "
    "number of threads, best of several chunk sizes; start of the process not counted",
    "wall_s": "engines: from starting the process to its exit, start-up included (seme has called fsync by then, "
    "mergekit has not); floor: until all is written, WITHOUT fsync",
    "durable_s": "until the output is on disk; engines: wall_s + an fsync of every output file right after the exit; "
    "floor: written and WITH fsync, in one run with wall_s",
    "user_s, system_s, cpu_s": "CPU seconds of the process, their sum",
    "peak_anonymous_bytes": "largest RssAnon seen, every 20 ms: memory that is not page cache",
    "peak_rss_bytes": "VmHWM at the last look: page cache mapped by the process is in it",
    "durable_over_floor": "median durable_s / median durable_s of the floor: both with fsync; like with like",
    "wall_over_floor": "median wall_s / median wall_s of the floor: floor without fsync, hard on an engine that syncs",
    "mergekit_over_seme_durable": "median durable_s of mergekit / median durable_s of seme",
    "mergekit_over_seme_wall": "median wall_s of mergekit (no fsync) / median wall_s of seme (with fsync)",
    "mergekit_over_seme_cpu": "median cpu_s of mergekit / median cpu_s of seme",
    "agreement": "values of seme and mergekit compared at sampled places: share that is bit-equal, largest difference",
    "inputs_cached": "share of the inputs' bytes in the page cache, the lowest seen before and after the rounds",
}

CHUNKS = (1 * MIB, 2 * MIB, 4 * MIB)
SAMPLE_EVERY_S = 0.02
MARGIN = 2 * GIB
SETTLE_S = 0.5


@dataclass(frozen=True)
class Method:
    """A recipe: which models it reads and its parameters.

    Attributes:
        name: the ``merge_method``.
        base: the base is an input.
        tuned: number of fine-tunes it reads.
        parameters: per fine-tune; a list holds one value for each.
        shared: parameters of the whole merge.
        peer: mergekit has the method as well.
    """

    name: str
    base: bool
    tuned: int
    parameters: dict[str, Any]
    shared: dict[str, Any]
    peer: bool = True

    def inputs(self, models: Sequence[Path]) -> list[Path]:
        """The folders it reads; ``models[0]`` is the base."""
        return [*models[: 1 if self.base else 0], *models[1 : 1 + self.tuned]]

    def config(self, models: Sequence[Path]) -> str:
        """The recipe in the schema both engines read; JSON, which is YAML."""
        entries = []
        for i, model in enumerate(models[1 : 1 + self.tuned]):
            values = {k: v[i] if isinstance(v, list) else v for k, v in self.parameters.items()}
            entries.append({"model": str(model), "parameters": values})
        config: dict[str, Any] = {"merge_method": self.name, "models": entries}
        # Some methods of mergekit give float32 without out_dtype.
        config.update(dtype="bfloat16", out_dtype="bfloat16")
        if self.base:
            config["base_model"] = str(models[0])
        if self.shared:
            config["parameters"] = self.shared
        return json.dumps(config, indent=1)


# With 0.5, 0.3, 0.2 many sums would lie halfway between two bfloat16 values, where the last bit is a toss-up.
WEIGHTS = {"weight": [0.4, 0.35, 0.25]}
METHODS = {
    "passthrough": Method("passthrough", base=False, tuned=1, parameters={}, shared={}),
    "linear": Method("linear", base=False, tuned=3, parameters=WEIGHTS, shared={}),
    "slerp": Method("slerp", base=True, tuned=1, parameters={}, shared={"t": 0.4}),
    "nuslerp": Method("nuslerp", base=False, tuned=2, parameters={"weight": [0.4, 0.6]}, shared={}),
    "multislerp": Method("multislerp", base=False, tuned=3, parameters=WEIGHTS, shared={}),
    "karcher": Method("karcher", base=False, tuned=3, parameters={}, shared={}),
    "nearswap": Method("nearswap", base=True, tuned=1, parameters={}, shared={"t": 0.001}),
    "arcee_fusion": Method("arcee_fusion", base=True, tuned=1, parameters={}, shared={}),
    "model_stock": Method("model_stock", base=True, tuned=3, parameters={}, shared={}),
    "task_arithmetic": Method("task_arithmetic", base=True, tuned=3, parameters=WEIGHTS, shared={}),
    # The checkpoints have 30 % of their entries changed: at density 0.5 every change is kept and the threshold is
    # zero; at 0.2 the threshold lies among the changes.
    "ties": Method("ties", base=True, tuned=3, parameters={**WEIGHTS, "density": 0.5}, shared={}),
    "ties_sparse": Method("ties", base=True, tuned=3, parameters={**WEIGHTS, "density": 0.2}, shared={}),
    "breadcrumbs": Method("breadcrumbs", base=True, tuned=3, parameters={**WEIGHTS, "density": 0.2}, shared={}),
    "breadcrumbs_ties": Method(
        "breadcrumbs_ties", base=True, tuned=3, parameters={**WEIGHTS, "density": 0.2}, shared={}
    ),
    "dare_linear": Method("dare_linear", base=True, tuned=3, parameters={**WEIGHTS, "density": 0.5}, shared={}),
    "dare_ties": Method("dare_ties", base=True, tuned=3, parameters={**WEIGHTS, "density": 0.5}, shared={}),
    "della_linear": Method("della_linear", base=True, tuned=3, parameters={**WEIGHTS, "density": 0.5}, shared={}),
    "della": Method("della", base=True, tuned=3, parameters={**WEIGHTS, "density": 0.5}, shared={}),
    "sce": Method("sce", base=True, tuned=3, parameters={}, shared={"select_topk": 0.1}),
    "ram": Method("ram", base=True, tuned=3, parameters={}, shared={}),
    "ramplus_tl": Method("ramplus_tl", base=True, tuned=3, parameters={}, shared={}),
    "seme": Method("seme", base=True, tuned=3, parameters={}, shared={}, peer=False),
}

MERGEKIT_OPTIONS = ["--no-copy-tokenizer", "--quiet"]


def shards(folder: Path) -> list[Path]:
    """The weight files of a model, sorted."""
    return sorted(folder.glob("*.safetensors"))


def warm(files: Sequence[Path]) -> None:
    """Read the files once, so that they are in the page cache."""
    buffer = memoryview(mmap.mmap(-1, 4 * MIB))
    for file in files:
        with open(file, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def cached(files: Sequence[Path]) -> float:
    """Share of the files' pages that are in the page cache (``mincore``)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    resident = pages = 0
    for file in files:
        size = file.stat().st_size
        vector = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        with open(file, "rb") as f:
            address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, f.fileno(), 0)
            if libc.mincore(address, size, vector):
                raise OSError(ctypes.get_errno(), f"mincore {file}")
            libc.munmap(address, size)
        resident += np.count_nonzero(np.frombuffer(vector, dtype=np.uint8) & 1)
        pages += len(vector)
    return float(resident / pages)


def touch_memory() -> None:
    """Have a child process write to most of the free memory once.

    A virtual machine gets a page from its host at the first touch, which costs far more than any later use; that
    cost must not fall on whichever engine happens to come first.
    """
    program = (
        "import mmap, re\n"
        "free = int(re.search(r'MemAvailable:\\s*(\\d+)', open('/proc/meminfo').read())[1]) * 1024\n"
        "open('/proc/self/oom_score_adj', 'w').write('1000')\n"
        "step = bytes(1 << 26)\n"
        f"memory = mmap.mmap(-1, max(len(step), free - {MARGIN}) // len(step) * len(step), mmap.MAP_PRIVATE)\n"
        "for at in range(0, len(memory), len(step)): memory[at:at + len(step)] = step\n"
    )
    subprocess.run([sys.executable, "-c", program], check=False)


def disk_speed(folder: Path) -> dict[str, Any]:
    """MB/s of writing (with fsync) and of reading back 512 MiB past the page cache, and the filesystem's name."""
    file = folder / "disk-speed"
    block = os.urandom(4 * MIB)
    total = 512 * MIB
    with open(file, "wb", buffering=0) as f:
        start = time.perf_counter()
        for _ in range(total // len(block)):
            f.write(block)
        os.fsync(f.fileno())
        write = total / (time.perf_counter() - start)
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    while os.read(descriptor, 4 * MIB):
        pass
    read = total / (time.perf_counter() - start)
    os.close(descriptor)
    file.unlink()
    kind = subprocess.run(["df", "--output=fstype", str(folder)], capture_output=True, text=True, check=True)
    filesystem = kind.stdout.split()[-1]
    return {"filesystem": filesystem, "write_mb_s": round(write / 1e6), "read_mb_s": round(read / 1e6)}


class Failed(RuntimeError):
    """A process that was to be timed failed."""


def run_process(command: Sequence[str], threads: int, log: Path) -> dict[str, float]:
    """Run a command from the root of the repository; its times and its peak memory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)))
    peaks = {"RssAnon:": 0, "VmHWM:": 0}
    ended = threading.Event()

    def watch(status: Path) -> None:
        while True:
            with contextlib.suppress(OSError):
                for line in status.read_text().splitlines():
                    name, _, value = line.partition("\t")
                    if name in peaks:
                        peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            if ended.wait(SAMPLE_EVERY_S):
                return

    with open(log, "wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        watcher = threading.Thread(target=watch, args=(Path(f"/proc/{process.pid}/status"),))
        watcher.start()
        try:
            _, status, used = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            ended.set()
            watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise Failed(f"exit code {process.returncode} of {' '.join(command)}\n{tail}")
    return {
        "wall_s": wall,
        "user_s": used.ru_utime,
        "system_s": used.ru_stime,
        "peak_anonymous_bytes": peaks["RssAnon:"],
        "peak_rss_bytes": peaks["VmHWM:"],
    }


def sync_folder(folder: Path) -> float:
    """fsync every file below the folder, and the folder; the seconds it took."""
    start = time.perf_counter()
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def remove(folder: Path) -> None:
    """Delete an output and wait until the disk has nothing left to do for it."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    time.sleep(SETTLE_S)


def excerpts(folder: Path) -> dict[str, np.ndarray]:
    """The middle 8192 values of every tensor of a bfloat16 model, as uint16 bits."""
    found = {}
    for file in shards(folder):
        with open(file, "rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(start - 8))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                count = min(8192, (end - begin) // 2)
                f.seek(start + begin + (end - begin - 2 * count) // 4 * 2)
                found[name] = np.frombuffer(f.read(2 * count), dtype=np.uint16)
    return found


def agreement(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Share of bit-equal values and largest difference, of what two engines made of one recipe."""
    if ours.keys() != theirs.keys():
        raise Failed(f"outputs differ in the tensors {sorted(ours.keys() ^ theirs.keys())[:3]}")
    a, b = (np.concatenate([side[k] for k in sorted(ours)]) for side in (ours, theirs))
    x, y = ((side.astype(np.uint32) << 16).view(np.float32) for side in (a, b))
    equal = float(np.mean(a == b))
    if equal < 0.5 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise Failed(f"only {equal:.1%} of the values agree: the engines did not run the same merge")
    return {"values": len(a), "bit_equal": equal, "largest_difference": float(np.max(np.abs(x - y)))}


class Cell:
    """One size and method: its inputs, and one timed run of each engine."""

    def __init__(self, size: str, method: str, models: Sequence[Path], scratch: Path, threads: int) -> None:
        self.size, self.method, self.threads = size, method, threads
        self.inputs = METHODS[method].inputs(models)
        self.bytes = 2 * checkpoints.SIZES[size].parameters
        self.config = scratch / "config.yaml"
        self.config.write_text(METHODS[method].config(models))
        self.output = scratch / "output"
        self.log = scratch / "log"
        self.excerpts: dict[str, dict[str, np.ndarray]] = {}

    @property
    def files(self) -> list[Path]:
        """All weight files that the method reads."""
        return [file for folder in self.inputs for file in shards(folder)]

    def floor(self, chunk: int, shared: bool, limit: int | None = None) -> dict[str, float]:
        """One run of ``floor.py``."""
        spec = {
            "inputs": [[str(f) for f in shards(folder)] for folder in self.inputs],
            "output": str(self.output),
            "bytes": self.bytes,
            "threads": self.threads,
            "chunk": chunk,
            "shared": shared,
            "limit": limit,
            "fsync": limit is None,
        }
        command = [sys.executable, str(ROOT / "benchmarks" / "floor.py"), json.dumps(spec)]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        remove(self.output)
        sample: dict[str, float] = json.loads(run.stdout)
        sample["durable_s"] = sample.pop("fsync_s")
        return sample

    def best_floor(self) -> dict[str, Any]:
        """Chunk size and layout of the fastest floor: one file for all threads, or one file each."""
        limit = min(self.bytes, 512 * MIB)
        found = []
        for chunk in CHUNKS:
            for shared in (True, False):
                self.floor(chunk, shared, limit)
                runs = [self.floor(chunk, shared, limit)["wall_s"] for _ in range(2)]
                found.append((min(runs), {"chunk": chunk, "shared": shared}))
        return min(found, key=lambda entry: entry[0])[1]

    def command(self, engine: str) -> list[str]:
        """What a user would type."""
        files, threads = [str(self.config), str(self.output)], str(self.threads)
        if engine == "seme":
            return [sys.executable, "-m", "seme", "merge", *files, "--threads", threads, "--quiet"]
        return [mergekit() or "mergekit-yaml", *files, "--num-threads", threads, *MERGEKIT_OPTIONS]

    def engine(self, name: str) -> dict[str, float]:
        """One run of seme or mergekit; checks the size of the output and takes its excerpts."""
        sample = run_process(self.command(name), self.threads, self.log)
        sample["durable_s"] = sample["wall_s"] + sync_folder(self.output)
        written = sum(f.stat().st_size for f in shards(self.output))
        if not self.bytes <= written <= self.bytes + MIB:
            raise Failed(f"{name} wrote {written} bytes of weights, expected {self.bytes} and headers")
        self.excerpts[name] = excerpts(self.output)
        remove(self.output)
        return sample


def mergekit() -> str | None:
    """Path of ``mergekit-yaml`` beside this interpreter or on PATH, or None."""
    beside = Path(sys.executable).parent / "mergekit-yaml"
    return str(beside) if beside.exists() else shutil.which("mergekit-yaml")


def summary(samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians and quartiles of every engine and the ratios of the medians."""
    stats: dict[str, dict[str, Any]] = {}
    for engine, runs in samples.items():
        if runs:
            stats[engine] = {
                key: summarize([run[key] for run in runs]) for key in runs[0] if key not in ("user_s", "system_s")
            }
            stats[engine]["cpu_s"] = summarize([run["user_s"] + run["system_s"] for run in runs])
    ratios: dict[str, Any] = {}
    for engine in stats:
        if engine != "floor":
            for key in ("durable", "wall"):
                ratios.setdefault(engine, {})[f"{key}_over_floor"] = ratio(stats, engine, "floor", f"{key}_s")
    if "seme" in stats and "mergekit" in stats:
        for key in ("durable", "wall", "cpu"):
            ratios[f"mergekit_over_seme_{key}"] = ratio(stats, "mergekit", "seme", f"{key}_s")
    return {"summary": stats, "ratios": ratios}


def ratio(stats: dict[str, dict[str, Any]], engine: str, other: str, key: str) -> float:
    """Quotient of two medians."""
    return float(stats[engine][key]["median"] / stats[other][key]["median"])


def measure(cell: Cell, floor: dict[str, Any], repeats: dict[str, int], results: Results) -> None:
    """Warm up, then run the engines in turns, each as often as asked for; the entry is kept after every round."""
    key = f"{cell.size}/{cell.method}"
    warm(cell.files)
    before = cached(cell.files)
    if before < 1:
        print(f"{key}: only {before:.0%} of the inputs fit in the page cache", flush=True)

    def run(engine: str) -> dict[str, float]:
        return cell.floor(**floor) if engine == "floor" else cell.engine(engine)

    for engine in ("floor", "seme"):
        if repeats[engine]:
            run(engine)
    samples: dict[str, list[dict[str, float]]] = {engine: [] for engine in repeats}
    rounds = max(repeats.values())
    for number in range(rounds):
        turn = [e for e in repeats if number < repeats[e]]
        turn = turn[number % len(turn) :] + turn[: number % len(turn)]
        for engine in turn:
            sample = run(engine)
            samples[engine].append({"round": number, **{k: round(v, 4) for k, v in sample.items()}})
            print(f"{key} round {number + 1}: {engine} {sample['wall_s']:.2f} s", flush=True)
        both = "seme" in cell.excerpts and "mergekit" in cell.excerpts
        placed = {str(cell.config): "CONFIG", str(cell.output): "OUT", sys.executable: "python"}
        entry = {
            "complete": number + 1 == rounds,
            "size": cell.size,
            "method": cell.method,
            "parameters": cell.bytes // 2,
            "inputs": len(cell.inputs),
            "input_bytes": sum(f.stat().st_size for f in cell.files),
            "output_bytes": cell.bytes,
            "inputs_cached": min(before, cached(cell.files)),
            "threads": cell.threads,
            "floor": floor,
            "commands": {
                e: " ".join(placed.get(a, Path(a).name) for a in cell.command(e)) for e in repeats if e != "floor"
            },
            "agreement": agreement(cell.excerpts["seme"], cell.excerpts["mergekit"]) if both else None,
            **summary(samples),
            "samples": samples,
        }
        results.put(key, entry)


def report(entries: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of entries of the results file; times are medians until the output is on disk."""
    header = ["model, method", "floor s", "seme s", "x floor", "mergekit s", "x floor"]
    header += ["seme is faster", "to exit", "CPU s", "mergekit", "MiB", "mergekit", "same bits"]
    rows = []
    for entry in entries:
        stats, ratios = entry["summary"], entry["ratios"]
        row = [f"{entry['size']} {entry['method']}", f"{stats['floor']['durable_s']['median']:.2f}"]
        both = "seme" in stats and "mergekit" in stats
        for engine in ("seme", "mergekit"):
            known = engine in stats
            row.append(f"{stats[engine]['durable_s']['median']:.2f}" if known else "-")
            row.append(f"{ratios[engine]['durable_over_floor']:.2f}" if known else "-")
        row += [f"{ratios[f'mergekit_over_seme_{k}']:.1f}x" if both else "-" for k in ("durable", "wall")]
        row += [f"{stats[e]['cpu_s']['median']:.1f}" if e in stats else "-" for e in ("seme", "mergekit")]
        for engine in ("seme", "mergekit"):
            peak = stats[engine]["peak_anonymous_bytes"]["median"] / MIB if engine in stats else None
            row.append("-" if peak is None else f"{peak:.0f}")
        row.append(f"{entry['agreement']['bit_equal']:.2%}" if entry["agreement"] else "-")
        rows.append(row)
    return table(header, rows)


@contextlib.contextmanager
def scratch_folder(folder: Path | None, keep: bool) -> Iterator[Path]:
    """``folder``, or a new one on disk; at the end everything this program made in it is gone, unless kept."""
    if folder is None:
        place = os.environ.get("TMPDIR") or Path.cwd().parent
        scratch = Path(tempfile.mkdtemp(prefix="seme-benchmark-", dir=place))
    else:
        scratch = folder.resolve()
        scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
    finally:
        for path in (scratch / "config.yaml", scratch / "log", scratch / "output", *scratch.glob(".output.seme-*")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        if keep:
            print(f"kept: {scratch}")
        elif folder is None:
            shutil.rmtree(scratch, ignore_errors=True)


def needed(sizes: Sequence[str], methods: Sequence[str], keep: bool) -> int:
    """Bytes of disk: the models of one size (of all, if kept), one output, a margin."""
    models = 1 + max(METHODS[m].tuned for m in methods)
    weights = [2 * checkpoints.SIZES[s].parameters for s in sizes]
    return models * (sum(weights) if keep else max(weights)) + max(weights) + MARGIN


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description="time whole merges")
    parser.add_argument("--sizes", nargs="+", choices=checkpoints.SIZES, default=["0.43b", "1.5b"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of the floor and of seme (default 5)")
    parser.add_argument("--peer-repeats", type=int, default=3, help="timed runs of mergekit (default 3)")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=mergekit() is not None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="scratch folder (default: a new one in TMPDIR or beside this folder)")
    parser.add_argument("--out", type=Path, default=RESULTS / "merge-cpu.json")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints for the next run (needs --dir)")
    parser.add_argument("--skip-done", action="store_true", help="leave out what the results file has, complete")
    arguments = parser.parse_args()
    if arguments.keep and arguments.dir is None:
        parser.error("--keep needs --dir")
    if arguments.peers and mergekit() is None:
        parser.error("mergekit-yaml is not installed: pip install mergekit==0.1.5, or give --no-peers")
    # Ending by SIGTERM must clean up as ending by Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    with scratch_folder(arguments.dir, arguments.keep) as scratch:
        try:
            run_benchmarks(arguments, scratch)
        except Failed as e:
            sys.exit(f"failed: {e}")


def run_benchmarks(arguments: argparse.Namespace, scratch: Path) -> None:
    """All sizes and methods that were asked for."""
    need = needed(arguments.sizes, arguments.methods, arguments.keep)
    free = shutil.disk_usage(scratch).free
    if free < need:
        sys.exit(f"{scratch}: {free / GIB:.1f} GiB free, {math.ceil(need / GIB)} GiB needed; give another --dir")
    run = provenance()
    if run["machine"]["load"] > 0.5:
        print(f"warning: load {run['machine']['load']:.1f}: something else is running; numbers will be off")
    if set(arguments.sizes) != {"tiny"}:
        touch_memory()
    run["machine"]["disk"] = disk_speed(scratch)
    results = Results(arguments.out, run, ABOUT)
    keys = []
    for size in arguments.sizes:
        methods = []
        for method in arguments.methods:
            key = f"{size}/{method}"
            keys.append(key)
            old = results.get(key)
            if not (arguments.skip_done and old and old["complete"]):
                methods.append(method)
        if not methods:
            continue
        # mergekit knows architectures by their list of tensors, which a model of one tensor does not fit.
        peers = arguments.peers and size != "one-tensor"
        repeats = {"floor": arguments.repeats, "seme": arguments.repeats}
        with_peer = {**repeats, "mergekit": arguments.peer_repeats}
        tuned = max(METHODS[m].tuned for m in methods)
        if peers:
            # mergekit's warm-up: the same methods on a tiny model load its libraries and code.
            with checkpoints.checkpoints(scratch, "tiny", tuned, arguments.keep) as models:
                for method in methods:
                    if METHODS[method].peer:
                        Cell("tiny", method, models, scratch, arguments.threads).engine("mergekit")
        with checkpoints.checkpoints(scratch, size, tuned, arguments.keep) as models:
            os.sync()
            floor = None
            for method in methods:
                cell = Cell(size, method, models, scratch, arguments.threads)
                if floor is None:
                    warm(cell.files)
                    floor = cell.best_floor()
                measure(cell, floor, with_peer if peers and METHODS[method].peer else repeats, results)
    print(report([results.data["entries"][key] for key in keys]))


if __name__ == "__main__":
    main()
