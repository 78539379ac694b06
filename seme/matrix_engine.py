"""The engine of matrix methods: one tensor after the other, its products on all threads, rows streamed.

Where the element-wise engine (:mod:`seme.engine`) has many chunks in flight, here one matrix is: the products use every
core by themselves. Rows are read ahead while others are computed, so memory is the matrices that a method holds
for one tensor, and some rows of each model.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from seme.checkpoint import Checkpoint, Stored, Writer
from seme.dtypes import DType, float32
from seme.engine import Options, Progress, process_memory
from seme.errors import CheckpointError
from seme.methods._matrix import Context, Stack
from seme.ops.nonfinite import nonfinite
from seme.plan import Plan, TensorPlan
from seme.report.merge_report import MergeReport
from seme.roles import Role

if TYPE_CHECKING:
    import torch

    from seme.semantics.bases import SemanticBases

PIECE = 1 << 22
"""Bytes of a copy at a time."""


def buffer_memory(plan: Plan, options: Options) -> int:
    """Bytes of the largest tensor's matrices and of the rows in memory."""
    experts = len(plan.models) - 1
    workspace = plan.method.workspace
    held = [
        workspace(t.role, t.spec.shape, experts, t.arguments)
        for t in plan.tensors
        if workspace is not None and t.role is not None and not t.copy
    ]
    return max(held, default=0) + options.memory


def peak_memory(plan: Plan, options: Options) -> int:
    """About how many bytes the process will hold at its peak: torch, plan, matrices, and the semantic bases if used.

    Where a method runs models, one of them as well, with the keys and values of what it writes.
    """
    return process_memory(plan, torch=True) + buffer_memory(plan, options) + bases_memory(plan) + model_memory(plan)


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

    def __init__(self, plan: Plan, writer: Writer, backend: str, device: str, options: Options) -> None:
        self.plan, self.writer, self.options = plan, writer, options
        self.progress = Progress(total=sum(t.spec.numel * t.spec.dtype.itemsize for t in plan.tensors))
        self.report = MergeReport(plan)
        self.context = Context(
            backend, device, options.threads, options.memory // 4, functools.cache(self._bases), self.report.add
        )
        self._watch: Callable[[Progress], None] | None = None

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
            with torch.inference_mode():
                self._run()
                return self.report.finish(self.context.bases)
        finally:
            torch.set_num_threads(before)

    def _run(self) -> None:
        arguments = {t.name: t.arguments for t in self.plan.tensors if not t.copy}
        if self.plan.method.asks_for_whole(arguments):
            self._whole(arguments)
            return
        for tensor in self.plan.tensors:
            if tensor.copy:
                self._copy(tensor)
            elif tensor.spec.numel:
                self.plan.method.merge(self.stack(tensor, functools.partial(self._store, tensor)), **tensor.arguments)

    def _whole(self, arguments: Mapping[str, Mapping[str, Any]]) -> None:
        """All tensors together: the method asks for what it would make of each alone, and hands on what it decides."""
        import torch

        plan, tensors = self.plan, {t.name: t for t in self.plan.tensors}
        written: set[str] = set()

        def data_free(name: str) -> torch.Tensor:
            tensor = tensors.get(name)
            if tensor is None or tensor.copy:  # a stored copy of a tied head, or integers: not asked for what it holds
                return torch.zeros(plan.models[plan.donor].checkpoint.tensors[name].shape)
            single = replace(tensor, group=replace(tensor.group, out_dtype=float32))
            found = torch.empty(tensor.spec.numel)

            def keep(start: int, values: torch.Tensor) -> None:
                found[start : start + values.numel()] = values

            if tensor.spec.numel:
                plan.method.merge(self.stack(single, keep), **tensor.arguments)
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
        told = plan.method.whole([_Finite(plan.models[i].checkpoint, self) for i in order], arguments, emit, data_free)
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
                    self._load(tensor, model, start, min(start + step, source.numel))

    def stack(self, tensor: TensorPlan, store: Callable[[int, torch.Tensor], None]) -> Stack:
        """One tensor of all models, for a method; the output goes to ``store``."""
        assert tensor.role is not None
        return Stack(tensor.group, tensor.role, functools.partial(self._load, tensor), store, self.context)

    def _bases(self) -> SemanticBases:
        from seme.semantics.bases import SemanticBases

        base = self.plan.models[self.plan.donor]
        return SemanticBases.from_checkpoint(base.checkpoint.path, roles=self.plan.config.roles)

    def _load(self, tensor: TensorPlan, model: int, start: int, stop: int) -> torch.Tensor:
        import torch

        source = tensor.sources[model]
        dtype = source.dtype
        found = torch.empty(stop - start, dtype=dtype.to_torch())
        if start < stop:
            self.plan.models[model].checkpoint.read_into(source, start * dtype.itemsize, _bytes(found, dtype))
            self.finite_(found, source)
        return found

    def finite_(self, found: torch.Tensor, source: Stored) -> None:
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
        dtype = tensor.spec.dtype
        values = values.to("cpu", dtype.to_torch()).contiguous()
        self.writer.write(tensor.name, start * dtype.itemsize, _bytes(values, dtype))
        self._count(values.nbytes)

    def _count(self, written: int) -> None:
        self.progress.written += written
        self.progress.done += written
        if self._watch is not None:
            self._watch(self.progress)

    def _copy(self, tensor: TensorPlan) -> None:
        source = tensor.sources[0]
        for start in range(0, source.nbytes, PIECE):
            piece = memoryview(bytearray(min(PIECE, source.nbytes - start)))
            self.plan.models[0].checkpoint.read_into(source, start, piece)
            self.writer.write(tensor.name, start, piece)
            self._count(len(piece))


class _Finite:
    """A checkpoint, for a method that reads it by itself: what it reads is as ``--nonfinite`` says."""

    def __init__(self, checkpoint: Checkpoint, engine: MatrixEngine) -> None:
        self.path, self.tensors, self.config = checkpoint.path, checkpoint.tensors, checkpoint.config
        self._checkpoint, self._engine = checkpoint, engine

    def read_into(self, tensor: Stored, start: int, buffer: memoryview) -> None:
        """As that of the checkpoint; the piece is of whole elements."""
        import torch

        self._checkpoint.read_into(tensor, start, buffer)
        if tensor.dtype.mergeable and len(buffer):
            self._engine.finite_(torch.frombuffer(buffer, dtype=tensor.dtype.to_torch()), tensor)


def _bytes(tensor: torch.Tensor, dtype: DType) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    raw = (ctypes.c_char * (tensor.numel() * dtype.itemsize)).from_address(tensor.data_ptr())
    return memoryview(raw).cast("B")
