"""The least that a merge has to do with its files, as a program of its own: read every input, write one output.

``python benchmarks/floor.py SPEC`` where SPEC is JSON: ``inputs`` (one list of files per model, read as one
stream), ``output`` (folder, made here), ``bytes`` (of the output), ``threads``, ``chunk`` (bytes), ``shared``
(true: all threads write one file, at their own offsets; false: one file per thread), ``fsync`` (whether to), and
``limit`` (null, or stop after that many bytes of each stream). Standard library only.

Each thread owns one range of all streams. It walks it in chunks: a chunk of each input is read into the same
buffer, which is then written as a chunk of the output. So memory is touched as little as reading and writing allow.

Prints JSON: ``wall_s`` until all is written, ``fsync_s`` until it is on disk as well (both from the same
start), ``user_s`` and ``system_s`` (until all is written). Starting Python is not counted.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Stream = list[tuple[int, int]]  # descriptor and size of each file


def chunks(stream: Stream, begin: int, end: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    """Descriptor, offset and length of the pieces that make up [begin, end) of the concatenated files."""
    for descriptor, size in stream:
        at, stop = max(0, begin), min(size, end)
        while at < stop:
            length = min(chunk, stop - at)
            yield descriptor, at, length
            at += length
        begin -= size
        end -= size


def move(call: Callable[..., int], descriptor: int, offset: int, view: memoryview) -> None:
    """``os.preadv`` or ``os.pwritev`` until the whole view is done."""
    while len(view):
        done = call(descriptor, [view], offset)
        if done <= 0:
            raise OSError("unexpected end of file")
        view = view[done:]
        offset += done


def work(inputs: list[Stream], output: Stream, part: int, parts: int, chunk: int, limit: int) -> None:
    """One thread's share: its range of every input, and of the output."""
    buffer = memoryview(mmap.mmap(-1, chunk))
    pieces = []
    for stream in (*inputs, output):
        total = min(limit, sum(size for _, size in stream))
        pieces.append(chunks(stream, total * part // parts, total * (part + 1) // parts, chunk))
    for *reads, write in itertools.zip_longest(*pieces):
        for read in filter(None, reads):
            descriptor, offset, length = read
            move(os.preadv, descriptor, offset, buffer[:length])
        if write:
            descriptor, offset, length = write
            move(os.pwritev, descriptor, offset, buffer[:length])


def open_output(folder: str, size: int, threads: int, shared: bool) -> Stream:
    """New files of ``size`` bytes in all: one, or one for each thread's range."""
    files = 1 if shared else threads
    os.mkdir(folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    cuts = [size * i // files for i in range(files + 1)]
    return [
        (os.open(os.path.join(folder, f"out-{i}"), flags, 0o644), end - begin)
        for i, (begin, end) in enumerate(itertools.pairwise(cuts))
    ]


def run(spec: dict[str, Any]) -> dict[str, float]:
    """Read, write, sync; the times."""
    threads, limit = spec["threads"], spec["limit"] or sys.maxsize
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    inputs = []
    for files in spec["inputs"]:
        descriptors = [os.open(file, os.O_RDONLY) for file in files]
        inputs.append([(d, os.fstat(d).st_size) for d in descriptors])
    output = open_output(spec["output"], min(limit, spec["bytes"]), threads, spec["shared"])
    errors: list[BaseException] = []

    def guarded(part: int) -> None:
        try:
            work(inputs, output, part, threads, spec["chunk"], limit)
        except BaseException as e:
            errors.append(e)

    others = [threading.Thread(target=guarded, args=(part,)) for part in range(1, threads)]
    for thread in others:
        thread.start()
    guarded(0)
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]
    wall = time.perf_counter() - start
    now = resource.getrusage(resource.RUSAGE_SELF)
    if spec["fsync"]:
        for descriptor, _ in output:
            os.fsync(descriptor)
        os.fsync(os.open(spec["output"], os.O_RDONLY))
    return {
        "wall_s": wall,
        "fsync_s": time.perf_counter() - start,
        "user_s": now.ru_utime - used.ru_utime,
        "system_s": now.ru_stime - used.ru_stime,
    }


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
