"""Everything on a GPU in one go: build, test, sanitize, measure ops and whole merges; one JSON, and a table at the end.

``benchmarks/gpu/run.sh [PART ...]`` runs this. Each part is a process of its own with a time of its own, after which it
is ended and the next one begins; what a part leaves of its time the next ones may use, so that all of them end within
nine minutes. A part that fails costs no other: its entry in the results file says why, and its log has the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Results, load, table
from benchmarks.gpu.device import ABOUT, RESTART, judged, place

SECONDS = {"build": 110, "test": 110, "sanitize": 50, "ops": 40, "matrix": 50, "merge": 160}
"""What each part may take, in their order; together less than nine minutes."""
SMOKE_SECONDS = 300
PROCESSES = max(1, len(os.sched_getaffinity(0)) - 2)
"""Of the tests: compiling kernels is most of their time, and one core's work."""
GRACE = 5.0
RESTARTS = 5
BARE = ("torch", "triton", "pybind11", "pytest", "yaml", "numpy")
"""What has to be installed."""
TAIL = 3000
"""Characters of a log that the results file gets of a part that failed."""


class Failed(Exception):
    """A part did not do all it should; the text says what."""


class Runner:
    """The parts of one run, their logs and the results file."""

    def __init__(self, work: Path, smoke: bool) -> None:
        self.work, self.smoke = work, smoke
        self.environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        self.logs = Path(os.environ.get("OUT") or work).resolve()
        self.logs.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        self.deadline = 0.0

    def start(self) -> None:
        """Ask what is here; a process of its own, because this one stays off the GPU."""
        text = "import json; from benchmarks.gpu.device import Device, run_of; "
        text += f"print(json.dumps(run_of(Device({'cpu' if self.smoke else 'cuda'!r}))))"
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SystemExit(f"benchmarks.gpu: {sys.executable} has no torch that sees a CUDA GPU ({why}); set PYTHON")
        self.run: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if self.run["commit"] is None:
            print("benchmarks.gpu: no git repository here: SEME_COMMIT can say which commit this is", flush=True)
        self.file = place(self.run, self.work if self.smoke and not os.environ.get("OUT") else None)
        (self.work / "run.json").write_text(json.dumps(self.run))

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Keep an entry of this run beside those that the parts have kept meanwhile."""
        Results(self.file, self.run, ABOUT).put(name, entry)

    def part(self, name: str, seconds: float) -> bool:
        """Run one part; True if it did all it should."""
        print(f"== {name}, at most {seconds:.0f} s", flush=True)
        began = time.monotonic()
        self.deadline = began + seconds
        self.log = self.logs / f"{self.file.stem}-{name}.log"
        self.log.write_text("")
        entry: dict[str, Any] = {"limit": round(seconds)}
        try:
            entry |= PARTS[name](self) or {}
        except Failed as e:
            entry |= {"error": str(e), "log": self.log.read_text(errors="replace")[-TAIL:]}
        except Exception as e:
            entry |= {"error": f"{type(e).__name__}: {e}"}
        entry["took"] = round(time.monotonic() - began, 1)
        self.put(name, entry)
        print(f"== {name}: {entry.get('error', 'done')}, {entry['took']} s", flush=True)
        return "error" not in entry

    def call(self, *commands: Sequence[object], environment: dict[str, str] | None = None) -> list[int]:
        """Exit codes of commands that run at the same time, or raises :class:`Failed` when the time of the part is up.

        What they say goes to the log, and what is left of them is ended.
        """
        running = []
        try:
            with open(self.log, "ab") as log:
                for command in commands:
                    running.append(
                        subprocess.Popen(
                            [str(c) for c in command],
                            cwd=ROOT,
                            env=self.environment | (environment or {}),
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
                for process in running:
                    process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Failed("ended: its time was up") from None
        finally:
            end(running)
        return [process.returncode for process in running]

    def python(self, *arguments: object) -> list[object]:
        """A command of this interpreter."""
        return [sys.executable, *arguments]


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask what still runs to end, and its children; then end it."""
    for sign, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        alive = [p for p in processes if p.poll() is None]
        for process in alive:
            os.killpg(process.pid, sign)
        try:
            for process in alive:
                process.wait(wait)
        except subprocess.TimeoutExpired:
            continue


def build(runner: Runner) -> dict[str, Any]:
    """Both compiled modules, in place and at the same time."""
    if runner.smoke:
        return {"built": []}
    cmake = shutil.which("cmake")
    if cmake is None:
        raise Failed("cmake is not installed")
    import pybind11

    common = ["-S", ROOT, "-G", "Ninja", f"-DSEME_OUTPUT_DIR={ROOT / 'seme'}", f"-DPython_EXECUTABLE={sys.executable}"]
    common.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    steps = []
    for cuda in ("ON", "OFF"):
        folder = runner.work / f"cuda-{cuda}"
        # One source takes most of the time; nvcc compiles it for both GPUs at once if it is let.
        configure = [cmake, "-B", folder, f"-DSEME_CUDA={cuda}", "-DCMAKE_CUDA_FLAGS=--threads=0", *common]
        steps.append((f"_C{'_cuda' if cuda == 'ON' else ''}", configure, [cmake, "--build", folder]))
    codes = runner.call(*(configure for _, configure, _ in steps))
    wrong = [step[0] for step, code in zip(steps, codes, strict=True) if code]
    steps = [step for step in steps if step[0] not in wrong]
    codes = runner.call(*(step[2] for step in steps))
    wrong += [step[0] for step, code in zip(steps, codes, strict=True) if code]
    if wrong:
        raise Failed(f"{' and '.join(wrong)} did not build")
    return {"built": [p.name for p in (ROOT / "seme").glob(f"_C*{sysconfig.get_config_var('EXT_SUFFIX')}")]}


def test(runner: Runner) -> dict[str, Any]:
    """tests/gpu, in several processes that share the tests; those that need much memory are in one of their own."""
    pytest = runner.python("-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-m")
    if runner.smoke:
        codes = runner.call([*pytest, "large", "--collect-only"])
    else:
        shares = [f"SEME_TEST_SHARE={i}/{PROCESSES}" for i in range(PROCESSES)]
        codes = runner.call([*pytest, "large"], *(["env", share, *pytest, "not large"] for share in shares))
    lines = [x for x in runner.log.read_text(errors="replace").splitlines() if " passed" in x or " failed" in x]
    if any(codes):
        raise Failed(f"tests failed: {'; '.join(lines) or codes}")
    return {"summaries": lines}


def sanitize(runner: Runner) -> dict[str, Any]:
    """A few tests of the CUDA C++ kernels under compute-sanitizer, which is beside nvcc if it is there."""
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parent / "compute-sanitizer" if nvcc else None
    program = str(beside) if beside is not None and beside.exists() else shutil.which("compute-sanitizer")
    if program is None:
        return {"skipped": "compute-sanitizer is not installed"}
    found = {}
    tests = runner.python("-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-m", "sanitize")
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", 9, "--target-processes", "all", *tests]
        try:
            # Every tensor an allocation of its own, so that an access beyond its end is seen.
            (code,) = runner.call(command, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            found[tool] = "errors" if code == 9 else f"exit code {code}" if code else "clean"
        except Failed as e:
            found[tool] = str(e)
    if any(value != "clean" for value in found.values()):
        raise Failed(f"compute-sanitizer: {found}")
    return found


def measured(module: str, *options: str) -> Callable[[Runner], dict[str, Any]]:
    """A part that measures; it is started anew when it has lost its GPU, and goes on behind what took it."""

    def part(runner: Runner) -> dict[str, Any]:
        command = runner.python("-m", module, "--run", runner.work / "run.json", "--out", runner.file, *options)
        command += ["--smoke"] if runner.smoke else []
        if module.endswith("merge"):
            command += ["--dir", runner.work, "--seconds", f"{runner.deadline - time.monotonic() - GRACE:.0f}"]
        for _ in range(RESTARTS):
            (code,) = runner.call(command)
            if code == 0:
                return {}
            if code != RESTART and code > 0:
                raise Failed(f"exit code {code}; its entries say why")
        raise Failed(f"lost its GPU {RESTARTS} times; its entries say where")

    return part


PARTS: dict[str, Callable[[Runner], dict[str, Any]]] = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "ops": measured("benchmarks.gpu.measure"),
    "matrix": measured("benchmarks.gpu.matrix"),
    "merge": measured("benchmarks.gpu.merge"),
}


def report(data: dict[str, Any], run: str) -> str:
    """Tables of what one run has measured: ops, products, merges, what has no number; a short one, and the parts."""
    from benchmarks.gpu import matrix, measure, merge

    entries = {key: e for key, e in data["entries"].items() if e["run"] == run}

    def of(part: str) -> dict[str, Any]:
        return {key.partition("/")[2]: e for key, e in entries.items() if key.startswith(f"{part}/")}

    found = [measure.report(of("ops")), matrix.report(of("matrix")), merge.report(of("merge"))]
    wrong = {key: e.get("error") or e.get("failed") for key, e in entries.items() if "/" in key}
    rows = [[key, str(why).replace("\n", " ")[:100]] for key, why in wrong.items() if why]
    found += [table(["no number, or not all", "why"], rows)] if rows else []
    rows = [row for key, e in entries.items() if "/" in key for row in best(key.partition("/")[2], e)]
    found.append(table(["measured", "what", "best", "by", "goal"], rows))
    outcomes = {key: e.get("error") or e.get("skipped") or "done" for key, e in entries.items() if "/" not in key}
    rows = [[key, f"{entries[key]['took']:.0f}", outcome[:100]] for key, outcome in outcomes.items()]
    return "\n\n".join([*found, table(["part", "s", "outcome"], rows)])


def best(name: str, entry: dict[str, Any]) -> list[list[str]]:
    """Rows of the short table: what an entry has a goal for, by the backend that does it best."""
    rows = []
    for key, goal in (("of_copy", "goal"), ("of_product", "goal"), ("torch_over", "goal_over_torch")):
        ours = {b: x for b, x in entry.get(key, {}).items() if b != "torch"}
        if ours and entry.get(goal):
            backend = max(ours, key=lambda b: ours[b])
            rows.append([name, key, judged(ours[backend], entry[goal]), backend, f"{entry[goal]:.2f}"])
    if "bases" in entry.get("seconds", {}):
        took = judged(entry["seconds"]["bases"]["median"], entry["goal"], "{:.3f}", at_most=True)
        rows.append([name, "seconds", took, "torch", f"{entry['goal']:.2f}"])
    for engine, over in entry.get("over_floor", {}).items():
        rows.append([name, "x I/O floor", f"{over:.2f}", engine, "-"])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/run.sh", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(SECONDS)}, or all (default)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="for builds, models, logs")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny: does it work? Builds nothing")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; needs no GPU")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - {*SECONDS, "all"}:
        parser.error(f"{', '.join(sorted(unknown))}: no such part; expected {', '.join(SECONDS)} or all")
    parts = [p for p in SECONDS if p in options.parts or "all" in (options.parts or ["all"])]
    if options.dry_run:
        print(table(["part", "s"], [[p, str(SECONDS[p])] for p in parts]), flush=True)
        for module in ("measure", "matrix", "merge"):
            subprocess.run([sys.executable, "-m", f"benchmarks.gpu.{module}", "--dry-run"], cwd=ROOT, check=True)
        return
    if missing := [m for m in BARE if find_spec(m) is None]:
        print(f"benchmarks.gpu: not installed: {', '.join(missing)}; parts that need them will fail", flush=True)
    runner = Runner(options.work.resolve(), options.smoke)
    runner.start()
    limit = dict.fromkeys(SECONDS, SMOKE_SECONDS) if options.smoke else SECONDS
    end_of_all = time.monotonic() + sum(limit[p] for p in parts)
    good = []
    for i, name in enumerate(parts):
        later = sum(limit[p] for p in parts[i + 1 :])
        good.append(runner.part(name, end_of_all - time.monotonic() - later))
    print(report(load(runner.file), runner.run["date"]))
    print(f"{runner.file}: {runner.run['machine']['gpu']['name']}, torch {runner.run['versions']['torch']}")
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
