"""The engine: runs a plan. Workers read a chunk of every input, compute, and write, each on buffers of its own.

A tensor's passes are cut into chunks; the chunks of the current passes wait in one queue. A worker takes the
next chunk and reads, computes and writes it, so while some workers wait for the disk others compute. When the
last chunk of a pass is done, the method is told the result and gives the next pass. Memory is the workers'
buffers; it depends on neither the model nor the tensor. The output's bytes depend on neither chunks nor workers.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from seme import dtypes
from seme.dtypes import DType
from seme.errors import BackendError, CheckpointError, ConfigError
from seme.methods import Merge, Pass, Reduced
from seme.native import BLOCK, View
from seme.ops.nonfinite import OP as NONFINITE
from seme.ops.nonfinite import zero_nonfinite_
from seme.plan import Plan, TensorPlan
from seme.runtime import OutOfDeviceMemory, Place, Runtime
from seme.sizes import format_size

INT64 = dtypes.BY_NAME["int64"]
CHUNK_BYTES = 1 << 20
"""Bytes of one input per chunk: large enough to hide the cost of a call, small enough to stay in the L2 cache."""
SAMPLE_BLOCKS = 16
UNLIMITED = 1 << 62
"""Quotas from here on mean all; see the ops with ``tie_quotas``."""
PROCESS_MEMORY = 30_000_000
TORCH_MEMORY = 350_000_000
TENSOR_MEMORY = 1200
"""Resident bytes of the interpreter with seme, of it with torch, and of one input of a planned tensor, as measured."""
TRIES = 4
"""Times that the smallest chunk is tried on a device without memory: others there may be done with theirs."""
WAITING = 2
"""Workers beyond the number of threads, so that computing goes on while some wait for the disk."""


@dataclass(frozen=True)
class Options:
    """How to run a merge; none of it changes the output's bytes, except ``nonfinite``.

    Attributes:
        memory: bytes for all buffers, pinned ones on a GPU; None: 256 MiB, on a GPU 1 GiB.
        threads: chunks computed at once.
        nonfinite: what to do about inf and NaN in an input: ``error``, ``keep`` or ``zero``.
        gpu_memory: bytes of a GPU's memory; None: 80 % of what is free.
    """

    memory: int | None = None
    threads: int = 1
    nonfinite: str = "error"
    gpu_memory: int | None = None

    def buffers(self, place: Place) -> int:
        """Bytes for the buffers at a place."""
        if self.memory is not None:
            return self.memory
        return 1 << (28 if place.gpu is None else 30)


class Output(Protocol):
    """Where a merge goes: a :class:`seme.checkpoint.Writer`, whose methods these are, or what stands in for one."""

    def write(self, tensor: str, start: int, data: memoryview) -> None:
        """Take bytes from byte ``start`` of a tensor on, whole elements. Called from many threads."""

    def has(self, tensor: str, start: int, size: int) -> bool:
        """True if it needs these bytes no more."""

    def tell(self, tensor: str, what: Any) -> None:
        """Take what the method told of a tensor."""

    def told(self, tensor: str) -> Any:
        """What was told of a tensor before; None if it has to be merged."""


@dataclass
class Progress:
    """What has been done so far, for display."""

    total: int
    done: int = 0
    read: int = 0
    written: int = 0
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Chunk:
    """Pieces of a tensor, ``(first element, elements)``, processed as one run of ``numel`` elements."""

    pieces: tuple[tuple[int, int], ...]
    numel: int

    @property
    def start(self) -> int:
        """Its first element in the tensor."""
        return self.pieces[0][0]

    def halves(self, quantum: int) -> list[Chunk]:
        """Two chunks in its place, cut at a multiple of ``quantum`` elements; itself if it is too small."""
        cut = self.numel // 2 // quantum * quantum
        if cut == 0 or len(self.pieces) > 1:
            return [self]
        start = self.start
        return [Chunk(((start, cut),), cut), Chunk(((start + cut, self.numel - cut),), self.numel - cut)]


def workers(options: Options, place: Place) -> int:
    """Chunks in flight at once."""
    if place.gpu is None:
        return options.threads + WAITING
    from seme.gpu import WORKERS

    return min(WORKERS, options.threads + WAITING)


def chunk_bytes(plan: Plan, options: Options, place: Place) -> int:
    """Bytes of each buffer under the memory limits.

    Raises:
        ConfigError: a limit is too small for one block per buffer.
    """
    buffers = (plan.inputs + 1) * workers(options, place)
    size, limits = CHUNK_BYTES, {"memory": options.buffers(place)}
    if place.gpu is not None:
        from seme import gpu

        # Plain torch needs many temporary tensors of a chunk's size, the kernels none.
        size = CHUNK_BYTES if place.backend == "torch" else gpu.CHUNK_BYTES
        # What reductions add up in is beside the buffers.
        limits["gpu_memory"] = int(gpu.BUFFER_SHARE * place.gpu.limit) - buffers * gpu.RESULT_BYTES
    least = BLOCK * 8
    whole = max((t.unit * _widest(t) for t in plan.tensors), default=0)  # what must not be parted
    least_whole = max(least, -(-whole // least) * least)
    size = max(least_whole, min(size, *(limit // buffers for limit in limits.values())))
    for name, limit in limits.items():
        if size * buffers > limit:
            given, needed = options.buffers(place), buffers * least_whole
            if place.gpu is not None and name == "gpu_memory":
                given, needed = place.gpu.limit, int((needed + buffers * gpu.RESULT_BYTES) / gpu.BUFFER_SHARE)
            raise ConfigError(f"{name}: {given} bytes are too few for {buffers} buffers; give at least {needed}")
    return size // least * least


def _widest(tensor: TensorPlan) -> int:
    """Bytes of an element in its largest dtype, inputs and output."""
    return max([s.dtype.itemsize for s in tensor.sources] + [tensor.spec.dtype.itemsize])


def buffer_memory(plan: Plan, options: Options, place: Place) -> int:
    """Bytes of buffers that the merge will hold; on a GPU as many there again."""
    return chunk_bytes(plan, options, place) * (plan.inputs + 1) * workers(options, place)


def peak_memory(plan: Plan, options: Options, place: Place) -> int:
    """About how many bytes the process will hold at its peak."""
    return process_memory(plan, place.backend != "cpu") + buffer_memory(plan, options, place)


def process_memory(plan: Plan, torch: bool) -> int:
    """Bytes beside the buffers: interpreter, plan, torch if it is used, and ``.bin`` files, which torch maps."""
    torch = torch or any(s.needs_torch for t in plan.tensors for s in t.sources)
    mapped = sum(s.nbytes for t in plan.tensors for s in t.sources if s.file.suffix != ".safetensors")
    planned = sum(len(t.sources) for t in plan.tensors)
    return (TORCH_MEMORY if torch else PROCESS_MEMORY) + TENSOR_MEMORY * planned + mapped


class _Task:
    """One tensor on its way through its method's passes."""

    def __init__(self, plan: TensorPlan, merge: Merge | None, capacity: int) -> None:
        self.plan = plan
        self.merge = merge
        self.capacity = capacity
        self.current: Pass | None = None
        self.complete: set[int] = set()
        self.kept: dict[tuple[int, int], dict[int, Any]] = {}
        self.open = 0

    def begin(self, pass_: Pass) -> list[Chunk]:
        if self.current is not None and not self.current.sample:
            self.complete.update(self.current.inputs)  # read to the end, so known to be finite
        before, self.current = self.current, pass_
        if pass_.countdown is not None and (
            before is None or (before.countdown, before.inputs) != (pass_.countdown, pass_.inputs)
        ):
            self.counted: dict[int, list[int]] = {0: [0] * len(pass_.params[pass_.countdown.parameter])}
        quantum = pass_.op.quantum(pass_.params)
        chunks = self._sample(quantum) if pass_.sample else self._whole(quantum)
        self.open = len(chunks)
        self.seen = sum(c.numel for c in chunks)
        self.partial: dict[int, array[Any]] = {}
        self.shape: tuple[int, ...] = pass_.result.shape
        self.turn = threading.Condition()
        return chunks

    def _whole(self, quantum: int) -> list[Chunk]:
        numel = self.plan.group.numel
        step = self.capacity // quantum * quantum
        starts = range(0, numel, step)
        return [Chunk(((at, min(step, numel - at)),), min(step, numel - at)) for at in starts]

    def _sample(self, quantum: int) -> list[Chunk]:
        count = self.plan.group.numel // quantum
        n = min(max(1, SAMPLE_BLOCKS * BLOCK // quantum), self.capacity // quantum, count)
        if n == 0:
            return self._whole(quantum)
        pieces = tuple((count * i // n * quantum, quantum) for i in range(n))
        return [Chunk(pieces, n * quantum)]

    def reduced(self) -> Reduced:
        assert self.current is not None
        if self.current.op.ordered:
            data: array[Any] = array("d")
            for start in sorted(self.partial):
                data.extend(self.partial[start])
        else:
            parts = list(self.partial.values())
            data = parts[0]
            for other in parts[1:]:
                _add(data, other)
        return Reduced(data, self.shape, self.seen)


def _add(total: array[int], other: array[int]) -> None:
    from seme import native

    if native.why_not("_C") is None:
        native.module().add_int64(total.buffer_info()[0], other.buffer_info()[0], len(total))
    else:
        for i, value in enumerate(other):
            total[i] += value


class Engine:
    """Runs one plan into one output."""

    def __init__(self, plan: Plan, writer: Output, place: Place, options: Options) -> None:
        self.plan, self.writer, self.place, self.options = plan, writer, place, options
        self.size = chunk_bytes(plan, options, place)
        self._workers = workers(options, place)
        self._tasks: set[_Task] = set()
        self.progress = Progress(total=sum(t.spec.numel * t.spec.dtype.itemsize for t in plan.tensors))
        self._pending: Iterator[TensorPlan] = iter(plan.tensors)
        self._ready: deque[tuple[_Task, Chunk]] = deque()
        self._active = 0
        self._lock = threading.Condition()
        self._computing = threading.Semaphore(options.threads if place.gpu is None else self._workers)
        self._error: BaseException | None = None
        self._worker_ids = itertools.count()
        self._keep = True

    def run(self, watch: Callable[[Progress], None] | None = None) -> None:
        """Run to the end; ``watch`` is called about ten times a second.

        Raises:
            SemeError: the first error of any worker. KeyboardInterrupt stops all workers and is passed on.
        """
        workers: list[threading.Thread] = []
        try:
            for _ in range(self._workers):
                worker = threading.Thread(target=self._work)
                worker.start()
                workers.append(worker)
            while any(w.is_alive() for w in workers):
                for worker in workers:
                    worker.join(0.1 / len(workers))
                if watch is not None:
                    watch(self.progress)
        except BaseException as e:
            self._fail(e)
            raise
        finally:
            for worker in workers:
                worker.join()
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._ready.clear()
            self._lock.notify_all()

    def _work(self) -> None:
        worker = next(self._worker_ids)
        runtime = None
        try:
            runtime = self.place.runtime(self.plan.inputs, self.size)
            while True:
                job = self._take()
                if job is None:
                    return
                task, chunk = job
                self._chunk(runtime, worker, task, chunk, TRIES)
                with self._lock:
                    task.open -= 1
                    last = task.open == 0
                if last:
                    self._advance(task, task.reduced() if task.current and not task.current.writes else None)
        except BaseException as e:
            self._fail(e)
        finally:
            if runtime is not None:
                runtime.close()

    def _take(self) -> tuple[_Task, Chunk] | None:
        """The next chunk, else the first chunk of the next tensor; None when nothing is left."""
        while True:
            with self._lock:
                while True:
                    if self._error is not None:
                        return None
                    if self._ready:
                        return self._ready.popleft()
                    plan = next(self._pending, None)
                    if plan is not None:
                        self._active += 1
                        break
                    if self._active == 0:
                        self._lock.notify_all()
                        return None
                    self._lock.wait()
            self._start(plan)

    def _start(self, plan: TensorPlan) -> None:
        task = _Task(plan, None, max(self.size // _widest(plan), plan.unit))
        with self._lock:
            self._tasks.add(task)
        nbytes = plan.spec.numel * plan.spec.dtype.itemsize
        if nbytes == 0 or self.writer.has(plan.name, 0, nbytes):
            self._skip(nbytes)
            self._finished(task)
        elif plan.copy:
            self._copy(plan)
            self._finished(task)
        else:
            task.merge = self.plan.method.merge(plan.group, **plan.arguments)
            self._advance(task, None)

    def _advance(self, task: _Task, result: Reduced | None) -> None:
        """Tell the method the result of its pass and queue the next one."""
        assert task.merge is not None
        try:
            # The type of send() has no None, yet a generator that has not begun accepts nothing else.
            pass_ = next(task.merge) if result is None and task.current is None else task.merge.send(result)  # type: ignore[arg-type]
        except StopIteration:
            self._finished(task)
            return
        chunks = task.begin(pass_)
        with self._lock:
            # In front of other tensors, in order: a chunk with a countdown waits for the one before it.
            self._ready.extendleft((task, c) for c in reversed(chunks))
            self._lock.notify_all()

    def _finished(self, task: _Task) -> None:
        with self._lock:
            self._active -= 1
            self._tasks.discard(task)
            self._lock.notify_all()

    def _copy(self, plan: TensorPlan) -> None:
        source = plan.sources[0]
        buffer = bytearray(min(self.size, source.nbytes))
        for start in range(0, source.nbytes, len(buffer)):
            if self._error is not None:
                return
            piece = memoryview(buffer)[: min(len(buffer), source.nbytes - start)]
            if self.writer.has(plan.name, start, len(piece)):
                self._skip(len(piece))
                continue
            source.read_into(start, piece)
            self.writer.write(plan.name, start, piece)
            self._count(0, len(piece))

    def _skip(self, nbytes: int) -> None:
        """Bytes of the output that an earlier process wrote."""
        with self._lock:
            self.progress.done += nbytes

    def _count(self, read: int, written: int) -> None:
        with self._lock:
            self.progress.read += read
            self.progress.written += written
            self.progress.done += written

    def _chunk(self, runtime: Runtime, worker: int, task: _Task, chunk: Chunk, tries: int) -> None:
        """Process a chunk; where the device has no room for it, one half after the other, and the smallest again."""
        try:
            self._attempt(runtime, worker, task, chunk)
            return
        except OutOfDeviceMemory as e:
            runtime.recover()
            with self._lock:
                for each in self._tasks:
                    each.kept.clear()
                self._keep = False
                # Half of what it was, and once, although others find the same at the same time; in whole blocks.
                smaller = max(chunk.numel * _widest(task.plan), self.size) // 2
                self.size = max(1, min(self.size, smaller) // (BLOCK * 8)) * BLOCK * 8
            assert task.current is not None
            halves = chunk.halves(task.current.op.quantum(task.current.params))
            if len(halves) == 1 and tries == 1:
                raise BackendError(
                    f"{e}, not even for {format_size(chunk.numel * _widest(task.plan))} of each model; "
                    "free the device, or use --device cpu"
                ) from e
        if len(halves) == 1:
            time.sleep(0.05)
            tries -= 1
        for half in halves:
            self._chunk(runtime, worker, task, half, tries)

    def _attempt(self, runtime: Runtime, worker: int, task: _Task, chunk: Chunk) -> None:
        pass_, plan = task.current, task.plan
        assert pass_ is not None
        size = chunk.numel * pass_.result.dtype.itemsize
        written = pass_.writes and self.writer.has(plan.name, chunk.start * pass_.result.dtype.itemsize, size)
        if written and pass_.countdown is None:
            self._skip(size)
            return
        inputs = [(i, plan.sources[i].dtype) for i in pass_.inputs]
        kept: Mapping[int, Any] = task.kept.get((chunk.start, chunk.numel), {})
        new = [(i, dtype) for i, dtype in dict.fromkeys(inputs) if i not in kept]
        read = self._read(runtime, plan, new, chunk)
        with self._computing:
            if self.options.nonfinite == "zero":
                zero_nonfinite_([View(runtime.inputs[i].address, chunk.numel, dtype) for i, dtype in new])
            runtime.load(new, chunk.numel)
            runtime.use({i: kept[i] for i, _ in inputs if i in kept})
            if self.options.nonfinite == "error":
                self._check_finite(runtime, plan, [x for x in new if x[0] not in task.complete], chunk)
        params = pass_.params
        if pass_.countdown is not None:
            params = self._count_down(runtime, task, chunk, inputs)  # later chunks need it, whatever is written
        if written:
            self._skip(size)
            return
        if pass_.op.positional:
            params = {**params, "offset": chunk.start}
        if pass_.writes:
            dtype = pass_.result.dtype
            with self._computing:
                out = View(runtime.output.address, chunk.numel, dtype)
                runtime.run(pass_.op, params, inputs, chunk.numel, out, (chunk.numel,))
            self.writer.write(plan.name, chunk.start * dtype.itemsize, runtime.output.memory[:size])
            self._count(read, size)
            return
        with self._computing:
            key, into, shape = self._result(task, worker, chunk)
            out = View(into.buffer_info()[0], len(into), pass_.result.dtype)
            runtime.run(pass_.op, params, inputs, chunk.numel, out, shape)
            task.partial[key] = into
        if self._keep and not pass_.sample:  # the method passes over it again
            task.kept.setdefault((chunk.start, chunk.numel), {}).update(runtime.keep(new))
        self._count(read, 0)

    def _read(self, runtime: Runtime, plan: TensorPlan, inputs: list[tuple[int, DType]], chunk: Chunk) -> int:
        total = 0
        for i, dtype in inputs:
            at = 0
            for start, n in chunk.pieces:
                piece = runtime.inputs[i].memory[at : at + n * dtype.itemsize]
                plan.sources[i].read_into(start * dtype.itemsize, piece)
                at += len(piece)
            total += at
        return total

    def _result(self, task: _Task, worker: int, chunk: Chunk) -> tuple[int, array[Any], tuple[int, ...]]:
        """Memory for a reduction's result: per worker if it adds up, per chunk if blocks are kept in order."""
        pass_ = task.current
        assert pass_ is not None
        shape, key = pass_.result.shape, worker
        if pass_.op.ordered:
            shape, key = (-(-chunk.numel // pass_.op.quantum(pass_.params)), *shape[1:]), chunk.start
        found = task.partial.get(key)
        if found is None:
            found = array("q" if pass_.result.dtype == INT64 else "d", bytes(8 * math.prod(shape)))
        return key, found, shape

    def _count_down(
        self, runtime: Runtime, task: _Task, chunk: Chunk, inputs: list[tuple[int, DType]]
    ) -> dict[str, Any]:
        """The pass's parameters with its quotas lowered by what the chunks before this one hold.

        Chunks are taken in order, so the one before is done or in the hands of another worker; it never waits for
        a later one. Counts are by the element they reach up to, and stay: a chunk may be tried again in halves, and
        the next pass may count the same.
        """
        pass_ = task.current
        assert pass_ is not None
        countdown = pass_.countdown
        assert countdown is not None
        end = chunk.start + chunk.numel
        if not {chunk.start, end} <= task.counted.keys():
            counts = array("q", bytes(8 * len(pass_.params[countdown.parameter])))
            with self._computing:
                out = View(counts.buffer_info()[0], len(counts), INT64)
                runtime.run(countdown.op, countdown.params, inputs, chunk.numel, out, (len(counts),))
            with task.turn:
                while chunk.start not in task.counted:
                    if self._error is not None:
                        raise self._error
                    task.turn.wait(0.1)
                task.counted[end] = [a + b for a, b in zip(task.counted[chunk.start], counts)]
                task.turn.notify_all()
        before = task.counted[chunk.start]
        quotas = [
            quota if quota >= UNLIMITED else max(0, quota - used)
            for quota, used in zip(pass_.params[countdown.parameter], before)
        ]
        return {**pass_.params, countdown.parameter: quotas}

    def _check_finite(self, runtime: Runtime, plan: TensorPlan, inputs: list[tuple[int, DType]], chunk: Chunk) -> None:
        if not inputs:
            return
        counts = array("q", bytes(8 * len(inputs)))
        out = View(counts.buffer_info()[0], len(counts), INT64)
        runtime.run(NONFINITE, {}, inputs, chunk.numel, out, (len(counts),))
        for (i, _), count in zip(inputs, counts):
            if count:
                source = plan.sources[i]
                raise CheckpointError(
                    f"{source.file}: tensor {source.name}: {self._total_nonfinite(runtime, plan, i)} of "
                    f"{source.numel} elements are inf or NaN; repair the model, or pass --nonfinite keep or zero"
                )

    def _total_nonfinite(self, runtime: Runtime, plan: TensorPlan, i: int) -> int:
        """Count them in the whole tensor, for the message."""
        source = plan.sources[i]
        counts, size = array("q", [0]), self.size
        for start in range(0, source.nbytes, size):
            memory = runtime.inputs[i].memory[: min(size, source.nbytes - start)]
            source.read_into(start, memory)
            out = View(counts.buffer_info()[0], 1, INT64)
            numel = len(memory) // source.dtype.itemsize
            runtime.load([(i, source.dtype)], numel)
            runtime.run(NONFINITE, {}, [(i, source.dtype)], numel, out, (1,))
        return counts[0]
