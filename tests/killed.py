"""A merge that is killed (SIGKILL) at a given point of its writing, many times, each time resumed and compared.

``python -m tests.killed RECIPE FOLDER`` prints a line of JSON. Runs as a process of its own, which has one thread and
forks: thus a merge costs no start of an interpreter. A point is a call that changes something on disk; the process is
killed before it, in its middle (half of the data are written) or after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

CALLS = ("pwrite", "write", "fsync", "fdatasync", "rename", "replace", "unlink", "mkdir", "rmdir", "posix_fallocate")
MOMENTS = ("before", "half", "after")


class Shared:
    """Numbers that a killed process leaves behind: calls made, bytes of tensors written."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def __getitem__(self, i: int) -> int:
        return int.from_bytes(self.memory[8 * i : 8 * i + 8], "little")

    def __setitem__(self, i: int, value: int) -> None:
        self.memory[8 * i : 8 * i + 8] = value.to_bytes(8, "little")


def arm(shared: Shared, point: int, moment: str, names: list[str]) -> None:
    """Have this process killed at the call with number ``point``; ``names`` takes what each call was."""
    from seme.checkpoint import Writer

    lock = threading.Lock()

    def armed(name: str, call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with lock:
                now = shared[0]
                shared[0] = now + 1
                names.append(name)
            if now == point and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if now == point and moment == "half" and name in ("pwrite", "write"):
                data = memoryview(args[1])
                call(args[0], data[: len(data) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            if now == point and moment == "half" and name == "text":
                call(args[0], args[1], args[2][: len(args[2]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            found = call(*args, **kwargs)
            if name == "pwrite":
                with lock:
                    shared[1] = shared[1] + found
            if now == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return wrapper

    for name in CALLS:
        setattr(os, name, armed(name, getattr(os, name)))
    for name in ("text", "copy"):
        setattr(Writer, name, armed(name, getattr(Writer, name)))


def forked(task: Any) -> int:
    """Exit code of a process that runs a task; -9 if it was killed."""
    child = os.fork()
    if child == 0:
        code = 99
        with contextlib.suppress(BaseException):
            code = task()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(folder: Path) -> dict[str, str]:
    """Every file of a folder with a hash of its bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main(recipe: str, folder: Path, points: int, seed: int, options: list[str]) -> dict[str, Any]:
    """Kill and resume at ``points`` points or more, each rare call and random ones; what was seen.

    Every third time the process that goes on is killed as well, and a third one finishes.
    """
    # Imported here, not by each process again.
    import yaml  # noqa: F401

    import seme.merging
    from seme import methods, native
    from seme.cli import main as seme

    assert native.why_not("_C") is None
    assert methods.methods()
    arguments = ["merge", recipe, "--quiet", *options]
    reference, out, old = folder / "reference", folder / "out" / "model", folder / "old"
    journal = out.parent / ".model.seme-journal"
    shared, seen, random_ = Shared(), Counter[str](), random.Random(seed)
    assert forked(lambda: seme([*arguments, str(reference)])) == 0
    expected = tree(reference)
    overwrite = old.is_dir()
    before = tree(old) if overwrite else {}

    def start() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir(parents=True)
        if overwrite:
            shutil.copytree(old, out)
        shared[0] = shared[1] = 0

    def merge(point: int, moment: str, *more: str) -> int:
        names: list[str] = []

        def task() -> int:
            arm(shared, point, moment, names)
            extra = ["--overwrite"] if overwrite else []
            code = seme([*arguments, str(out), *extra, *more])
            (folder / "names").write_text("\n".join(names))
            return code

        return forked(task)

    start()
    assert merge(-1, "") == 0
    assert renamed(tree(out)) == renamed(expected)
    names = (folder / "names").read_text().split("\n")
    written = shared[1]
    rare = [i for i, name in enumerate(names) if name != "pwrite" and name != "write"]
    chosen = [(i, MOMENTS[n % 3]) for n, i in enumerate(rare)]
    chosen += [(random_.randrange(len(names)), random_.choice(MOMENTS)) for _ in range(points)]
    if len(chosen) > 2 * points:
        chosen = random_.sample(chosen, 2 * points)
    most, lost = 0, []
    for point, moment in chosen:
        start()
        what, total = f"{names[point]} {moment}", 0
        again = [(random_.randrange(len(names)), random_.choice(MOMENTS))] if random_.random() < 1 / 3 else []
        for attempt, (at, when) in enumerate([(point, moment), *again, (-1, "")]):
            shared[1], shared[0] = 0, 0
            code = merge(at, when, *(["--resume"] if attempt else []))
            total += shared[1]
            if code != -9:
                break
            seen[names[point] if attempt == 0 else "going on"] += 1
            state = tree(out) if out.exists() else None
            complete = state is not None and renamed(state) == renamed(expected)
            if state not in (None, before) and not complete:
                lost.append(f"{what}: a part of a model in its place")
            if complete and not journal.exists():
                code = 0  # all was done: there is nothing to go on with
                (out.parent / ".model.seme-lock").unlink(missing_ok=True)  # empty, taken by the next merge
                break
        most = max(most, total - written)
        left = sorted(p.name for p in out.parent.iterdir())
        if code != 0 or renamed(tree(out)) != renamed(expected) or left != [out.name]:
            lost.append(f"{what}: exit code {code}, beside it {left}")
    return {"points": sum(seen.values()), "killed": dict(seen), "calls": len(names), "redone": most, "lost": lost}


def renamed(files: dict[str, str]) -> dict[str, str]:
    """Without the model card, which has the folder's name in it."""
    return {k: v for k, v in files.items() if k != "README.md"}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])))
