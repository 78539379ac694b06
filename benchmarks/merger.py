"""One merge by seme on the CPU, planned and run as ``seme merge`` does, and watched from inside.

``python -m benchmarks.merger SPEC``, a process of its own for ``scale.py``. SPEC is JSON:

- ``recipe``, ``out``, ``threads``;
- ``shard``: bytes of an output file;
- ``discard``: drop the output's data instead of writing it. Its files are made, sparse, with headers, index, journal;
- ``noise``: files of random numbers by the name of a model's folder, from which its tensors are read instead of from
  its own files; or null;
- ``files``: the most files that the process may have open.

Prints JSON: seconds of planning and merging, on the clock and of the CPU; ``tensors``, ``shards`` and bytes; what the
process held at most, sampled every 20 ms.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from seme import merging, plan
from seme.checkpoint import Checkpoint, writer
from seme.checkpoint.safetensors import Stored
from seme.config import load

SAMPLE_EVERY_S = 0.02
SPARE = 4 << 20
"""Bytes at the end of a file of noise that are those at its beginning, so that no read has to wrap around."""


class Watch(threading.Thread):
    """What this process holds at most: anonymous memory, descriptors."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.descriptors = 0

    def look(self) -> None:
        """Take one sample."""
        status = Path("/proc/self/status").read_text()
        self.anonymous = max(self.anonymous, int(status.partition("RssAnon:")[2].split()[0]) * 1024)
        self.descriptors = max(self.descriptors, len(os.listdir("/proc/self/fd")) - 1)

    def run(self) -> None:
        """Take samples to the end of the process."""
        while True:
            self.look()
            time.sleep(SAMPLE_EVERY_S)


def discard() -> None:
    """Drop the data of the output; headers, which are written at the beginning of a file, stay."""
    put = writer._pwrite
    writer._allocate = os.ftruncate
    writer._pwrite = lambda descriptor, data, at: put(descriptor, data, at) if at == 0 else None


def read_noise(files: Mapping[str, str]) -> None:
    """Read tensors from files of random numbers, at a place that depends on the tensor's name."""
    opened = {name: os.open(file, os.O_RDONLY) for name, file in files.items()}
    sizes = {name: os.fstat(descriptor).st_size - SPARE for name, descriptor in opened.items()}

    def read_into(self: Checkpoint, tensor: Stored, start: int, buffer: memoryview) -> None:
        model = self.path.name
        at = (2 * zlib.crc32(tensor.name.encode()) + start) % sizes[model]
        if os.preadv(opened[model], [buffer], at) != len(buffer):
            raise ValueError(f"{len(buffer)} bytes at once; expected at most {SPARE}")

    Checkpoint.read_into = read_into  # type: ignore[method-assign]


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call returns, and its seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = call()
    return found, {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def main() -> None:
    """Command line."""
    spec = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (spec["files"], spec["files"]))
    if spec["discard"]:
        discard()
    if spec["noise"]:
        read_noise(spec["noise"])
    watch = Watch()
    watch.start()
    out = Path(spec["out"])
    # There is no room for what is dropped, which is all that planning for a target would add.
    target = None if spec["discard"] else out
    made, planned = timed(lambda: plan.make(load(Path(spec["recipe"])), target, spec["shard"]))
    watch.look()
    after_plan, options = watch.anonymous, merging.make_options(None, spec["threads"], "error")
    result, merged = timed(lambda: merging.run(made, out, options, "cpu", "cpu"))
    watch.look()
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    found = {
        "plan": planned,
        "merge": merged,
        "tensors": result.tensors,
        "shards": len(made.layout.files),
        "bytes_read": result.bytes_read,
        "bytes_written": result.bytes_written,
        "plan_anonymous_bytes": after_plan,
        "peak_anonymous_bytes": watch.anonymous,
        "peak_rss_bytes": peak,
        "descriptors": watch.descriptors,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
