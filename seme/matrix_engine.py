"""The engine of matrix methods: one tensor after the other, its products on all threads, rows streamed.

Where the element-wise engine (:mod:`seme.engine`) has many chunks in flight, here one matrix is: the products use every
core by themselves. Rows are read ahead while others are computed, so memory is the matrices that a method holds
for one tensor, and some rows of each model.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from seme.dtypes import DType, float32
from seme.engine import Options, Output, Progress, process_memory
from seme.errors import CheckpointError
from seme.methods._matrix import Context, Stack
from seme.ops._op import why_not
from seme.ops.nonfinite import nonfinite
from seme.plan import Model, Plan, TensorPlan
from seme.report.merge_report import MergeReport
from seme.roles import Role
from seme.runtime import OutOfDeviceMemory, Place
from seme.sizes import format_size
from seme.sources import Source

if TYPE_CHECKING:
    import torch

    from seme.semantics.bases import SemanticBases

PIECE = 1 << 22
"""Bytes of a copy at a time."""
GPU_ROWS = 1 << 29
"""Bytes of rows of all models on a GPU at once, at most."""
LEAST_ROWS = 1 << 20
"""Bytes of rows of all models below which a smaller share would not help where a GPU is full."""
WAITING = 4
"""Pieces of the output that may be on their way to the file while the next ones are computed."""


def held(plan: Plan, tensor: TensorPlan) -> int:
    """Bytes of the matrices that the method holds for a tensor."""
    workspace = plan.method.workspace
    if workspace is None or tensor.role is None or tensor.copy:
        return 0
    return workspace(tensor.role, tensor.spec.shape, plan.inputs - 1, tensor.arguments)


def fits(plan: Plan, tensor: TensorPlan, place: Place) -> bool:
    """True if a tensor's matrices, with the semantic bases and rows of all models, fit into the GPU's limit."""
    assert place.gpu is not None
    return held(plan, tensor) + bases_memory(plan) + rows_memory(place) <= place.gpu.limit


def rows_memory(place: Place) -> int:
    """Bytes of the rows of all models that are on the GPU at once."""
    assert place.gpu is not None
    return min(GPU_ROWS, place.gpu.limit // 8)


def buffer_memory(plan: Plan, options: Options, place: Place) -> int:
    """Bytes of the largest tensor's matrices, where they are on the CPU, and of the rows in memory."""
    here = [held(plan, t) for t in plan.tensors if place.gpu is None or not fits(plan, t, place)]
    return max(here, default=0) + options.buffers(place)


def peak_memory(plan: Plan, options: Options, place: Place) -> int:
    """About how many bytes the process will hold at its peak: torch, plan, matrices, and the semantic bases if used.

    Where a method runs models, one of them as well, with the keys and values of what it writes.
    """
    buffers = buffer_memory(plan, options, place)
    return process_memory(plan, torch=True) + buffers + bases_memory(plan) + model_memory(plan)


def notes(plan: Plan, place: Place) -> list[str]:
    """What a plan says of matrices that the GPU does not take."""
    if place.gpu is None:
        return []
    large = [t for t in plan.tensors if not fits(plan, t, place)]
    if not large:
        return []
    most = max(large, key=lambda t: held(plan, t))
    return [
        f"{len(large)} tensor(s) are merged on the CPU, {most.name} among them: its matrices take "
        f"{format_size(held(plan, most))}, {format_size(place.gpu.limit)} of {place.device} are for this merge"
    ]


def model_memory(plan: Plan) -> int:
    """Bytes of the largest model as rule ``sequence`` runs it to write text; 0 for other rules."""
    arguments = {t.name: t.arguments for t in plan.tensors if not t.copy}
    if not plan.method.asks_for_whole(arguments):
        return 0
    from seme.semantics.sequence import Probes, writing_memory

    probes = Probes(count=next(iter(arguments.values()))["probes"])
    return max(writing_memory(m.checkpoint, probes) for m in plan.models)


def bases_memory(plan: Plan) -> int:
    """Bytes of the semantic bases and their dual, float32; 0 if no tensor needs them."""
    uses = plan.method.uses_bases
    if uses is None or not any(uses(t.arguments) for t in plan.tensors if not t.copy):
        return 0
    head = next((t for t in plan.tensors if t.role is not None and t.role.role in (Role.HEAD, Role.VOCABULARY)), None)
    return 0 if head is None else 2 * 4 * head.spec.numel


class MatrixEngine:
    """Runs the plan of a matrix method into a writer."""

    def __init__(self, plan: Plan, writer: Output, place: Place, options: Options, tells: bool = True) -> None:
        """``tells``: make a merge report, where the method has one."""
        self.plan, self.writer, self.place, self.options = plan, writer, place, options
        self.progress = Progress(total=sum(t.spec.numel * t.spec.dtype.itemsize for t in plan.tensors))
        self.report = MergeReport(plan)
        # What is told of the experts is about the same ones in every slice.
        self._tells = tells and len({tuple(e.ref for e in part.entries) for part in plan.config.slices}) == 1
        self._made_bases = functools.cache(self._bases)
        rows = options.buffers(place) if place.gpu is None else min(options.buffers(place), rows_memory(place))
        # Without Triton each op takes CUDA C++ where it has it, else plain torch.
        backend = "auto" if place.backend == "cuda" else place.backend
        self.context = self._context(backend, place.device, rows // 4)
        self._entries: list[tuple[str, dict[str, Any]]] = []
        self._output = _Output(self._write)
        self._written: Counter[str] = Counter()
        self._watch: Callable[[Progress], None] | None = None
        self._counting = threading.Lock()  # what a GPU made is written by a thread of its own

    def run(self, watch: Callable[[Progress], None] | None = None) -> dict[str, Any] | None:
        """Run to the end; ``watch`` is called as tensors are written.

        Returns:
            The merge report, if the method makes one.

        Raises:
            SemeError: the first error.
        """
        import torch

        self._watch = watch
        before = torch.get_num_threads()
        torch.set_num_threads(self.options.threads)
        try:
            metered = nullcontext() if self.place.gpu is None else self.place.gpu.metered()
            with torch.inference_mode(), metered, self._output:
                self._run()
                self._output.wait()
                return self.report.finish(self.context.bases)
        finally:
            torch.set_num_threads(before)

    def _context(self, backend: str, device: str, workspace: int) -> Context:
        def report(name: str, entry: dict[str, Any]) -> None:
            self._entries.append((name, entry))

        return Context(
            backend, device, self.options.threads, workspace, self._made_bases, report if self._tells else None
        )

    def _run(self) -> None:
        arguments = {t.name: t.arguments for t in self.plan.tensors if not t.copy}
        if self.plan.method.asks_for_whole(arguments):
            self._whole(arguments)
            return
        for tensor in self.plan.tensors:
            nbytes = tensor.spec.numel * tensor.spec.dtype.itemsize
            told = [] if tensor.copy else self.writer.told(tensor.name)
            if nbytes and told is not None and self.writer.has(tensor.name, 0, nbytes):  # by an earlier process
                for name, entry in told:
                    self.report.add(name, entry)
                self.progress.done += nbytes
            elif tensor.copy:
                self._copy(tensor)
            elif nbytes:
                self._merge(tensor, functools.partial(self._store, tensor))

    def _merge(self, tensor: TensorPlan, store: Callable[[int, torch.Tensor], None]) -> None:
        """Merge one tensor; where the GPU has no room for it with fewer rows at a time, and then on the CPU."""
        context = self.context if self.place.gpu is None or fits(self.plan, tensor, self.place) else self._cpu
        while True:
            try:
                with self.place.gpu.translated() if self.place.gpu is not None else nullcontext():
                    self.plan.method.merge(self.stack(tensor, store, context), **tensor.arguments)
                break
            except OutOfDeviceMemory:
                if context is not self.context:
                    raise
            assert self.place.gpu is not None
            self._entries.clear()
            self._output.wait()
            self._uncount(tensor)
            self.place.gpu.empty_cache()
            if context.workspace >= 4 * LEAST_ROWS:
                context.workspace //= 4
            else:
                context = self._cpu
        self.writer.tell(tensor.name, self._entries)
        for name, entry in self._entries:
            self.report.add(name, entry)
        self._entries.clear()

    @functools.cached_property
    def _cpu(self) -> Context:
        """For what the GPU does not take."""
        backend = "torch" if why_not("cpu", "cpu") else "cpu"
        return self._context(backend, "cpu", self.options.buffers(self.place) // 4)

    def _whole(self, arguments: Mapping[str, Mapping[str, Any]]) -> None:
        """All tensors together: the method asks for what it would make of each alone, and hands on what it decides."""
        import torch

        plan, tensors = self.plan, {t.name: t for t in self.plan.tensors}
        written: set[str] = set()

        def data_free(name: str) -> torch.Tensor:
            tensor = tensors.get(name)
            if tensor is None or tensor.copy:  # a stored copy of a tied head, or integers: not asked for what it holds
                return torch.zeros(plan.models[plan.donor].tensors[name].shape)
            single = replace(tensor, group=replace(tensor.group, out_dtype=float32))
            found = torch.empty(tensor.spec.numel)

            def keep(start: int, values: torch.Tensor) -> None:
                found[start : start + values.numel()] = values

            if tensor.spec.numel:
                self._merge(single, keep)
            return found.view(tensor.spec.shape)

        def emit(name: str, merged: torch.Tensor) -> None:
            tensor = tensors.get(name)
            if tensor is not None and not tensor.copy:
                self._store(tensor, 0, merged.reshape(-1))
                written.add(name)

        if self.options.nonfinite == "error":
            self._check()
        order = [plan.donor, *(i for i in range(len(plan.models)) if i != plan.donor)]
        assert plan.method.whole is not None
        told = plan.method.whole([_Finite(plan.models[i], self) for i in order], arguments, emit, data_free)
        self.report.extra["sequence"] = told
        for tensor in plan.tensors:
            if tensor.copy:
                self._copy(tensor)
            elif tensor.name not in written:
                raise CheckpointError(
                    f"{tensor.sources[0].file}: tensor {tensor.name} was not merged; use rule: project"
                )

    def _check(self) -> None:
        """Find inf and NaN before a model runs with them, which takes long and then names no tensor."""
        for tensor in self.plan.tensors:
            for model, source in enumerate(() if tensor.copy else tensor.sources):
                step = PIECE // source.dtype.itemsize
                for start in range(0, source.numel, step):
                    self._load(tensor, "cpu", model, start, min(start + step, source.numel))

    def stack(self, tensor: TensorPlan, store: Callable[[int, torch.Tensor], None], context: Context) -> Stack:
        """One tensor of all models, for a method; the output goes to ``store``."""
        assert tensor.role is not None
        load = functools.partial(self._load, tensor, context.device)
        return Stack(tensor.group, tensor.role, load, store, context)

    def _bases(self) -> SemanticBases:
        from seme.semantics.bases import SemanticBases

        def make(device: str) -> SemanticBases:
            base = self.plan.models[self.plan.donor]
            return SemanticBases.from_checkpoint(base.checkpoint.path, device=device, roles=self.plan.config.roles)

        gpu = self.place.gpu
        if gpu is not None and bases_memory(self.plan) + rows_memory(self.place) <= gpu.limit:
            with suppress(OutOfDeviceMemory), gpu.translated():
                return make(gpu.name)
            gpu.empty_cache()
        return make("cpu")

    def _load(self, tensor: TensorPlan, device: str, model: int, start: int, stop: int) -> torch.Tensor:
        import torch

        source = tensor.sources[model]
        dtype = source.dtype

        def read(found: torch.Tensor) -> None:
            source.read_into(start * dtype.itemsize, _bytes(found, dtype))
            self.finite_(found, source)

        gpu = self.place.gpu
        if gpu is not None and device == gpu.name and start < stop:
            return gpu.upload(read, stop - start, dtype.to_torch())
        found = torch.empty(stop - start, dtype=dtype.to_torch())
        if start < stop:
            read(found)
        return found

    def finite_(self, found: torch.Tensor, source: Source) -> None:
        """Apply ``--nonfinite``, in place, to what was read of a tensor.

        Raises:
            CheckpointError: inf or NaN, and they are an error.
        """
        import torch

        self.progress.read += found.nbytes
        count = int(nonfinite([found], threads=self.options.threads)[0])
        if count and self.options.nonfinite == "error":
            raise CheckpointError(
                f"{source.file}: tensor {source.name}: {count} or more of {source.numel} elements are inf or NaN; "
                "repair the model, or pass --nonfinite zero"
            )
        if count:
            found.masked_fill_(~torch.isfinite(found), 0)

    def _store(self, tensor: TensorPlan, start: int, values: torch.Tensor) -> None:
        values = values.to(tensor.spec.dtype.to_torch())
        gpu = self.place.gpu
        if gpu is not None and str(values.device) == gpu.name:
            self._output.put(tensor, start, *gpu.download(values))
        else:
            self._write(tensor, start, values.cpu().contiguous())

    def _write(self, tensor: TensorPlan, start: int, values: torch.Tensor) -> None:
        dtype = tensor.spec.dtype
        self.writer.write(tensor.name, start * dtype.itemsize, _bytes(values, dtype))
        self._written[tensor.name] += values.nbytes
        self._count(values.nbytes)

    def _uncount(self, tensor: TensorPlan) -> None:
        """What was written of a tensor will be written again."""
        written = self._written.pop(tensor.name, 0)
        self.progress.written -= written
        self.progress.done -= written

    def _count(self, written: int) -> None:
        with self._counting:
            self.progress.written += written
            self.progress.done += written
            if self._watch is not None:
                self._watch(self.progress)

    def _copy(self, tensor: TensorPlan) -> None:
        source = tensor.sources[0]
        for start in range(0, source.nbytes, PIECE):
            piece = memoryview(bytearray(min(PIECE, source.nbytes - start)))
            source.read_into(start, piece)
            self.writer.write(tensor.name, start, piece)
            self._count(len(piece))


class _Output:
    """Writes what a GPU hands over, in order, while it computes what comes next."""

    def __init__(self, write: Callable[[TensorPlan, int, torch.Tensor], None]) -> None:
        self._write = write
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def put(self, tensor: TensorPlan, start: int, values: torch.Tensor, arrived: Callable[[], None]) -> None:
        """Write ``values`` when ``arrived`` returns; raises what went wrong with an earlier one."""

        def task() -> None:
            arrived()
            self._write(tensor, start, values)

        if len(self._pending) >= WAITING:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(task))

    def wait(self) -> None:
        """Until all of it is written."""
        while self._pending:
            self._pending.popleft().result()


class _Finite:
    """A model, for a method that reads it by itself as a checkpoint: what it reads is as ``--nonfinite`` says."""

    def __init__(self, model: Model, engine: MatrixEngine) -> None:
        self.path, self.tensors, self.config = model.checkpoint.path, model.tensors, model.checkpoint.config
        self._engine = engine

    def read_into(self, tensor: Source, start: int, buffer: memoryview) -> None:
        """As that of the checkpoint; the piece is of whole elements."""
        import torch

        tensor.read_into(start, buffer)
        if tensor.dtype.mergeable and len(buffer):
            self._engine.finite_(torch.frombuffer(buffer, dtype=tensor.dtype.to_torch()), tensor)


def _bytes(tensor: torch.Tensor, dtype: DType) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    raw = (ctypes.c_char * (tensor.numel() * dtype.itemsize)).from_address(tensor.data_ptr())
    return memoryview(raw).cast("B")
