"""The least that a merge has to do with its files, as a program of its own: read every input, write one output.

``python benchmarks/floor.py SPEC`` where SPEC is JSON: ``inputs`` (one list of files per model, read as one
stream), ``output`` (folder, made here), ``bytes`` (of the output), ``threads``, ``chunk`` (bytes), ``shared``
(true: all threads write one file, at their own offsets; false: one file per thread), ``fsync`` (whether to), and
``limit`` (null, or stop after that many bytes of each stream). Standard library only.

Each thread owns one range of all streams. It walks it in chunks: a chunk of each input is read into the same
buffer, which is then written as a chunk of the output. So memory is touched as little as reading and writing allow.

Prints JSON: ``wall_s`` until all is written, ``fsync_s`` until it is on disk as well (both from the same
start), ``user_s`` and ``system_s``. Starting Python is not counted.
"""

import itertools
import json
import mmap
import os
import resource
import sys
import threading
import time


def chunks(files, begin, end, chunk):
    """(descriptor, offset, length) of the pieces that make up [begin, end) of the concatenated files."""
    for descriptor, size in files:
        at, stop = max(0, begin), min(size, end)
        while at < stop:
            length = min(chunk, stop - at)
            yield descriptor, at, length
            at += length
        begin -= size
        end -= size


def move(call, descriptor, offset, view):
    """``os.preadv`` or ``os.pwritev`` until the whole view is done."""
    while len(view):
        done = call(descriptor, [view], offset)
        if done <= 0:
            raise OSError("unexpected end of file")
        view = view[done:]
        offset += done


def main():
    spec = json.loads(sys.argv[1])
    threads, chunk = spec["threads"], spec["chunk"]
    limit = spec["limit"] or sys.maxsize
    os.mkdir(spec["output"])
    errors = []

    def work(number, inputs, outputs, begin, end):
        try:
            buffer = memoryview(mmap.mmap(-1, chunk))
            reads = [
                chunks(files, total * number // threads, total * (number + 1) // threads, chunk)
                for files in inputs
                for total in [min(limit, sum(size for _, size in files))]
            ]
            writes = chunks(outputs, begin, end, chunk)
            for *read, write in itertools.zip_longest(*reads, writes):
                for piece in read:
                    if piece:
                        descriptor, offset, length = piece
                        move(os.preadv, descriptor, offset, buffer[:length])
                if write:
                    descriptor, offset, length = write
                    move(os.pwritev, descriptor, offset, buffer[:length])
        except BaseException as e:
            errors.append(e)

    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    inputs = []
    for files in spec["inputs"]:
        descriptors = [os.open(file, os.O_RDONLY) for file in files]
        inputs.append([(d, os.fstat(d).st_size) for d in descriptors])
    size = min(limit, spec["bytes"])
    cuts = [size * i // threads for i in range(threads + 1)]
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    if spec["shared"]:
        outputs = [(os.open(os.path.join(spec["output"], "out"), flags, 0o644), size)]
    else:
        outputs = [
            (os.open(os.path.join(spec["output"], f"out-{i}"), flags, 0o644), cuts[i + 1] - cuts[i])
            for i in range(threads)
        ]
    workers = [
        threading.Thread(target=work, args=(i, inputs, outputs, cuts[i], cuts[i + 1])) for i in range(1, threads)
    ]
    for worker in workers:
        worker.start()
    work(0, inputs, outputs, cuts[0], cuts[1])
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    wall = time.perf_counter() - start
    now = resource.getrusage(resource.RUSAGE_SELF)
    if spec["fsync"]:
        for descriptor, _ in outputs:
            os.fsync(descriptor)
        os.fsync(os.open(spec["output"], os.O_RDONLY))
    fsync = time.perf_counter() - start
    print(
        json.dumps(
            {
                "wall_s": wall,
                "fsync_s": fsync,
                "user_s": now.ru_utime - used.ru_utime,
                "system_s": now.ru_stime - used.ru_stime,
            }
        )
    )


if __name__ == "__main__":
    main()
