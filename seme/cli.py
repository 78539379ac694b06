"""The command line: ``seme merge``, ``verify``, ``methods``, ``bases``, ``env``, ``demo``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seme import __version__
from seme.errors import KEPT, ConfigError, KeptInterrupt, LateInterrupt, SemeError

if TYPE_CHECKING:
    from seme.config import MergeConfig
    from seme.engine import Options, Progress
    from seme.merging import MergeResult
    from seme.plan import Plan
    from seme.steps import Step

COMPLETE = "; the merge was complete"
SHOWN = 20
"""Problems that are printed; JSON has all."""
BASES = {
    "required": "required",
    "optional": "optional, task vectors from it are merged instead of the models",
    "input": "optional, counts as one more input",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 2 for a mistake of the user's; 1 for a fault, or if verify found something wrong;
        128 + the signal's number when stopped, so 130 for Ctrl-C.
    """
    with _signals():
        args = argparse.Namespace(debug=False, state="")
        try:
            args = _parser().parse_args(arguments)
            code: int = args.run(args)
            return code
        except SemeError as e:
            if args.debug:
                raise
            return _fail(args, str(e), 1 if e.fault else 2)
        except KeyboardInterrupt as e:
            number = e.args[0] if e.args else signal.SIGINT
            by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
            state = {LateInterrupt: COMPLETE, KeptInterrupt: KEPT}.get(type(e), args.state)
            return _fail(args, f"interrupted{by}{state}", 128 + number)
        except BrokenPipeError:
            return 1
        except Exception as e:
            if args.debug:
                raise
            return _fail(args, f"{type(e).__name__}: {e} (a fault of seme's or the machine's; --debug shows where)", 1)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP stop as Ctrl-C does; after one of them the process only cleans up, and ignores more."""
    before: dict[int, Any] = {}

    def stop(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        before.clear()
        raise KeyboardInterrupt(number)

    if threading.current_thread() is threading.main_thread():  # elsewhere Python handles none
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored, as nohup asks for, or not Python's
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _fail(args: argparse.Namespace, message: str, code: int) -> int:
    message = " ".join(message.split())
    if getattr(args, "json", False):
        print(json.dumps({"error": message, "exit_code": code}))
    print(f"seme: error: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="seme", description="Merge language models without data and training.")
    parser.add_argument("--version", action="version", version=f"seme {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.add_argument("--json", action="store_true", help="print JSON for machines")
        sub.set_defaults(run=run, state="")
        return sub

    def computing(sub: argparse.ArgumentParser) -> None:
        """How a merge is computed."""
        sub.add_argument("--memory", metavar="SIZE", help="limit of the buffers (default: 256MiB, on a GPU 1GiB)")
        sub.add_argument("--threads", type=int, metavar="N", help="chunks computed at once (default: all cores)")
        sub.add_argument(
            "--backend",
            default="auto",
            choices=("auto", "cpu", "torch", "triton", "cuda"),
            help="kernels to use (default: %(default)s)",
        )
        sub.add_argument(
            "--device",
            default="auto",
            metavar="DEVICE",
            help="auto, cpu or cuda[:N]; auto takes a GPU where it is worth its start (default: %(default)s)",
        )
        sub.add_argument(
            "--nonfinite",
            default="error",
            choices=("error", "keep", "zero"),
            help="inf or NaN in an input: stop, keep or replace by 0 (default: %(default)s)",
        )
        sub.add_argument("--seed", type=int, metavar="N", help="of methods that draw random numbers (default: 0)")
        sub.add_argument("--compat", choices=("mergekit",), help="mergekit's values where seme's differ by default")

    merge = command("merge", _merge, "merge models as a mergekit-style YAML recipe says")
    merge.add_argument("config", metavar="CONFIG", help="the recipe, a YAML file")
    merge.add_argument("out", metavar="OUT", type=Path, help="the new model folder")
    merge.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    merge.add_argument("--verbose", "-v", action="store_true", help="with --dry-run: every tensor and its parameters")
    merge.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it is a model, once the merge is complete"
    )
    merge.add_argument(
        "--resume", action="store_true", help="go on with a merge into OUT that was killed or stopped, if there is one"
    )
    merge.add_argument(
        "--checksums", action="store_true", help="write a hash of every tensor and file into OUT, for seme verify"
    )
    computing(merge)
    merge.add_argument("--gpu-memory", metavar="SIZE", help="limit of the GPU's memory (default: 80%% of what is free)")
    merge.add_argument(
        "--out-shard-size", default="5GB", metavar="SIZE", help="largest output file (default: %(default)s)"
    )
    merge.add_argument(
        "--keep-steps", type=Path, metavar="DIR", help="keep the results of recipes with a name in this folder"
    )
    merge.add_argument("--quiet", "-q", action="store_true", help="print nothing but errors")

    verify = command("verify", _verify, "check that a merged model is whole, or what its recipe gives; reads only")
    verify.add_argument("out", metavar="OUT", type=Path, help="the model folder")
    verify.add_argument(
        "--against",
        metavar="CONFIG",
        help="a recipe, from which tensors are computed again and compared (OUT/seme_config.yml is that of the merge); "
        "options below that the merge had must be given again",
    )
    verify.add_argument(
        "--sample", default="32", metavar="N|all", help="tensors that are computed again (default: %(default)s)"
    )
    verify.add_argument(
        "--sample-seed",
        type=int,
        default=0,
        metavar="N",
        help="other tensors for another number (default: %(default)s)",
    )
    computing(verify)
    verify.add_argument("--quiet", "-q", action="store_true", help="print nothing but problems and errors")

    methods = command("methods", _methods, "list the merge methods, or explain one")
    methods.add_argument("name", metavar="NAME", nargs="?", help="a method")

    bases = command("bases", _bases, "compute and keep the semantic bases of a model, and say how well they resolve it")
    bases.add_argument("model", metavar="MODEL", help="a model folder, or a repository on the hub")
    bases.add_argument("--no-fold-norm", action="store_true", help="take the head without the gain of the final norm")
    bases.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda[:N] (default: %(default)s)")

    command("env", _env, "versions, devices, which backends work and why others do not")

    demo = command("demo", _demo, "train three small models, merge two of them onto the third, compare")
    demo.add_argument(
        "out", metavar="OUT", type=Path, nargs="?", help="folder for models and result (default: seme-demo)"
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="write into OUT even if it is not empty")
    demo.add_argument("--quiet", "-q", action="store_true", help="print the table only")
    return parser


def _merge(args: argparse.Namespace) -> int:
    from seme import gpu, steps
    from seme import plan as planning
    from seme.checkpoint import local_path
    from seme.merging import check_resume, make_options, may_replace, merge_steps, run
    from seme.sizes import format_size, parse_size

    args.state = "; nothing was written"
    if args.verbose and not args.dry_run:
        raise ConfigError("--verbose: shows every tensor of the plan; add --dry-run")
    options = make_options(args.memory, args.threads, args.nonfinite, args.gpu_memory)
    gpu.check(args.backend, args.device)  # before models are downloaded
    shard = parse_size(args.out_shard_size, "--out-shard-size")
    found_steps = steps.read(Path(args.config), seed=args.seed, compat=args.compat)
    check_resume(found_steps, args.resume)

    def make(config: MergeConfig, name: str | None, target: Path | None) -> Plan:
        overwrite = args.overwrite and name is None
        if target is not None:
            overwrite = may_replace(target, overwrite, args.resume)
        return planning.make(config, target, shard, overwrite, local_path(args.config))

    if args.dry_run:
        return _dry_run(args, found_steps, options, make)
    notes: list[str] = []

    def one(config: MergeConfig, name: str | None, place: Path) -> MergeResult:
        target = args.out if name is None else place
        plan = make(config, name, target)
        notes.extend(plan.notes)
        if not args.quiet and not args.json:
            for line in (*([f"step: {name}"] if name is not None else []), *(f"note: {n}" for n in plan.notes)):
                print(line)
        display = _Display(quiet=args.quiet or args.json)
        with display:
            overwrite = args.overwrite and name is None
            goes_on = args.resume if len(found_steps) == 1 else None
            checksums = args.checksums and name is None
            return run(plan, target, options, args.backend, args.device, overwrite, display.update, goes_on, checksums)

    result = merge_steps(found_steps, args.out, args.keep_steps, args.overwrite, one)
    args.state = COMPLETE
    peak = _peak_memory()
    if args.json:
        found: dict[str, Any] = {
            "path": str(result.path),
            "tensors": result.tensors,
            "bytes_read": result.bytes_read,
            "bytes_written": result.bytes_written,
            "seconds": result.seconds,
            "backend": result.backend,
            "device": result.device,
            "peak_gpu_bytes": result.gpu_bytes,
            "peak_rss_bytes": peak,
            "notes": notes,
        }
        print(json.dumps(found))
    elif not args.quiet:
        rate = (result.bytes_read + result.bytes_written) / max(result.seconds, 1e-9)
        gpu_memory = "" if result.device == "cpu" else f", {format_size(result.gpu_bytes)} of {result.device}"
        print(
            f"{result.path}: {result.tensors} tensors, {format_size(result.bytes_written)} in {result.seconds:.1f} s "
            f"({format_size(rate)}/s read and written), peak memory {format_size(peak)}{gpu_memory}"
        )
    return 0


def _dry_run(
    args: argparse.Namespace,
    found: Sequence[Step],
    options: Options,
    make: Callable[[MergeConfig, str | None, Path | None], Plan],
) -> int:
    """Check everything and print the plan; of several recipes, of those whose models are all there."""
    from seme import steps
    from seme.merging import ready
    from seme.report.plan import plan_as_dict, plan_as_text

    if len(found) > 1:
        steps.check(found, args.keep_steps)
    shown = []
    for step in found:
        if step.needs:
            what: dict[str, Any] = {"needs": list(step.needs)}
            text = f"planned when there is {', '.join(step.needs)}"
        else:
            plan = make(step.config, step.name, args.out if step.name is None else None)
            try:
                place = ready(plan, options, args.backend, args.device)
            finally:
                plan.close()
            what = plan_as_dict(plan, options, place, args.verbose)
            text = plan_as_text(plan, options, place, args.verbose)
        shown.append(({"name": step.name, **what}, f"step      {step.name or 'the output'}\n{text}"))
        if len(found) == 1:
            shown = [(what, text)]
    if args.json:
        print(json.dumps([what for what, _ in shown] if len(found) > 1 else shown[0][0], indent=2))
    else:
        print("\n\n".join(text for _, text in shown))
    return 0


def _peak_memory() -> int:
    """Bytes that were resident at most."""
    try:
        with open("/proc/self/status", encoding="ascii") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux; may count what the process held that started this one
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Display:
    """Progress: a bar on a terminal, a line every ten seconds elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool, doing: str = "merging", done: str = "written") -> None:
        self.quiet, self._doing, self._done = quiet, doing, done
        self.terminal = not quiet and sys.stderr.isatty()
        self._said = time.monotonic()
        self._bar: Any = None
        self._row: Any = None

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: Progress) -> None:
        if self.quiet:
            return
        if self.terminal:
            self._draw(progress)
        elif time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            print(self._line(progress), file=sys.stderr, flush=True)

    def _rate(self, progress: Progress) -> float:
        return (progress.read + progress.written) / max(time.monotonic() - progress.started, 1e-9)

    def _line(self, progress: Progress) -> str:
        from seme.sizes import format_size

        elapsed = time.monotonic() - progress.started
        share = progress.done / max(progress.total, 1)
        left = elapsed * (1 - share) / share if share > 0 else 0.0
        return (
            f"{share:4.0%}  {format_size(progress.done)} of {format_size(progress.total)} {self._done}, "
            f"{format_size(self._rate(progress))}/s read and written, {left:.0f} s left"
        )

    def _draw(self, progress: Progress) -> None:
        from seme.sizes import format_size

        if self._bar is None:
            if time.monotonic() - progress.started < 0.5:
                return  # most small merges are over before a bar would help
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[memory]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._row = self._bar.add_task(self._doing, total=progress.total, rate="", memory="")
            self._bar.start()
        self._bar.update(
            self._row,
            total=progress.total,
            completed=progress.done,
            rate=f"{format_size(self._rate(progress))}/s",
            memory=f"peak {format_size(_peak_memory())}",
        )


def _verify(args: argparse.Namespace) -> int:
    from seme.sizes import format_size
    from seme.verifying import verify

    display = _Display(args.quiet or args.json, "verifying", "checked")
    with display:
        report = verify(
            args.out,
            None if args.against is None else Path(args.against),
            sample=args.sample,
            sample_seed=args.sample_seed,
            memory=args.memory,
            threads=args.threads,
            backend=args.backend,
            device=args.device,
            nonfinite=args.nonfinite,
            seed=args.seed,
            compat=args.compat,
            watch=display.update,
        )
    problems = report.problems
    if args.json:
        found = {
            "path": str(report.path),
            "tensors": report.tensors,
            "bytes": report.bytes,
            "hashed": report.hashed,
            "recomputed": report.recomputed,
            "problems": [{"file": p.file, "tensor": p.tensor, "what": p.what} for p in problems],
            "notes": report.notes,
            "seconds": report.seconds,
        }
        print(json.dumps(found, indent=2))
    elif problems or not args.quiet:
        for line in (*(f"note: {n}" for n in report.notes), *problems[:SHOWN]):
            print(line)
        if len(problems) > SHOWN:
            print(f"and {len(problems) - SHOWN} more; --json lists all")
        done = [f"{report.tensors} tensors, {format_size(report.bytes)} read"]
        done.append("no manifest" if report.hashed is None else f"{report.hashed} hashes compared")
        if args.against is not None:
            done.append(f"{len(report.recomputed)} tensors computed again")
        print(f"{report.path}: {f'{len(problems)} problem(s)' if problems else 'fine'}: {', '.join(done)}")
    return 1 if problems else 0


def _methods(args: argparse.Namespace) -> int:
    from seme.methods import get, methods

    if args.name is None:
        found = methods()
        if args.json:
            print(json.dumps({name: m.summary for name, m in found.items()}, indent=2))
        else:
            width = max(map(len, found))
            for name, m in found.items():
                print(f"{name:<{width}}  {m.summary}")
        return 0
    m = get(args.name)
    rows = [
        {"name": p.name, "type": p.kind.__name__, "scope": p.scope, "default": p.default, "doc": p.doc}
        for p in m.params
    ]
    if args.json:
        print(json.dumps({"name": m.name, "summary": m.summary, "source": m.source, "parameters": rows}, indent=2))
        return 0
    print(f"{m.name}: {m.summary}\nsource: {m.source}")
    print(f"base_model: {BASES[m.base]}")
    for p in m.params:
        default = "required" if p.required else f"default {p.default}"
        scope = {"shared": "one value", "model": "per model", "expert": "per model, not the base"}[p.scope]
        print(f"  {p.name} ({p.kind.__name__}, {scope}, {default}): {p.doc}")
    return 0


def _bases(args: argparse.Namespace) -> int:
    from seme.semantics.summary import as_text, collect

    found = collect(args.model, fold_norm=not args.no_fold_norm, device=args.device)
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0


def _env(args: argparse.Namespace) -> int:
    from seme.env import as_text, collect

    found = collect()
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from seme.demo import run

    found = run(args.out, seed=args.seed, overwrite=args.overwrite, quiet=args.quiet, as_json=args.json)
    if args.json:
        print(json.dumps(found, indent=2))
    return 0
