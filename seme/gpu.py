"""Merging on one GPU: which merges are worth it, how much of its memory they take, and the buffers of their workers.

Each worker reads a chunk of every model into pinned memory, copies it to the GPU, computes there, copies the result
back and writes it, on a CUDA stream of its own. So while one waits for the disk another copies and a third computes:
the streams overlap what a single one would do in turn. Where a method passes over a tensor more than once, chunks stay
on the GPU from the first pass to the last, as far as there is room.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from seme.dtypes import DType
from seme.errors import BackendError, ConfigError, SemeError
from seme.native import View
from seme.ops._op import BACKENDS, Op, Params, choose_backend, why_not
from seme.runtime import Buffer, OutOfDeviceMemory, Place, Runtime, host_tensor
from seme.sizes import format_size

if TYPE_CHECKING:
    import torch

    from seme.plan import Plan

WORKERS = 8
"""Chunks in flight at most: enough that one reads, one writes and the copies of others overlap with a kernel."""
CHUNK_BYTES = 1 << 25
"""Bytes of one input per chunk at most: copies of this size run at the full rate of the bus."""
SHARE = 0.8
"""Of the free memory of a GPU, what a merge takes unless it is told otherwise."""
BUFFER_SHARE = 0.5
"""Of that, what the buffers of the workers may take; the rest keeps chunks between passes and serves the kernels."""
LEAST_MEMORY = 1 << 30
"""Bytes that a GPU must have for a merge that may run elsewhere."""
CUDA_MODELS = 32
"""Tensors that a kernel in CUDA C++ takes."""

RESULT = -1
"""Of a worker's memory, what results are in; the others go by the number of an input."""
RESULT_BYTES = 8 * 65538
"""Bytes per task vector of the largest result of a reduction, a histogram."""

START_SECONDS = 5.0
"""Assumed cost of using a GPU at all: import torch, create the CUDA context, load kernels."""
CPU_BYTES = 1.5e9
"""Bytes of input that one CPU thread merges per second, the slowest of the element-wise methods (TIES of 4 models)."""
CPU_FLOPS = 40e9
"""Flops of matrix products per second and CPU thread."""


def why_none() -> str | None:
    """None if the driver shows a CUDA device, else why there is none; does not import torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver here (libcuda.so.1)"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return "the CUDA driver shows no GPU" + (f" (CUDA_VISIBLE_DEVICES={hidden})" if hidden is not None else "")
    return None


def check(backend: str, device: str, auto: bool = True) -> None:
    """Refuse a backend or device that does not work here, before anything is downloaded; ``auto`` may be a device.

    Raises:
        BackendError: the message says why.
    """
    kind = device.partition(":")[0]
    known = ("auto", "cpu", "cuda") if auto else ("cpu", "cuda")
    if device not in known and not (kind == "cuda" and device[5:].isdecimal()):
        raise BackendError(f"device {device}: expected {', '.join(known)} or cuda:N")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise BackendError(f"device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")
        if device[5:] and int(device[5:]) >= torch.cuda.device_count():
            raise BackendError(f"device {device}: there are {torch.cuda.device_count()}; the first one is cuda:0")
    if device != "auto":
        choose_backend(backend, kind)
        return
    asked = _asked(backend)
    if asked != "auto" and (reason := why_not(asked, "cpu")) is not None and (other := _unusable(asked)) is not None:
        raise BackendError(f"backend {asked}: {reason}" + (f"; {other}" if asked in BACKENDS else ""))


def choose(plan: Plan, threads: int, backend: str = "auto", device: str = "auto", limit: int | None = None) -> Place:
    """Where to run a plan.

    Args:
        plan: the plan.
        threads: CPU threads that it may use.
        backend: auto, cpu, torch, triton or cuda.
        device: auto, cpu, or cuda[:N]. auto takes a GPU that is there if the merge is long enough to be worth it.
        limit: bytes of the GPU's memory for the merge; default: 80 % of what is free.

    Where the device is not asked for, a GPU that is full or does not start is a reason to take the CPU.

    Raises:
        BackendError: the backend or device does not work here.
        ConfigError: ``limit`` is more than the GPU has.
    """
    if plan.method.matrix and _asked(backend) == "cuda":
        raise BackendError(f"backend cuda: not all products of {plan.method.name} are in CUDA C++; use auto or triton")
    check(backend, device)
    auto, why = device == "auto", f"device {device} asked for"
    if auto:
        device, why = _auto(plan, threads, _asked(backend))
    gpu = None
    if device != "cpu":
        try:
            gpu = _start(device, limit, LEAST_MEMORY if auto and limit is None else 0)
        except BackendError as e:
            if not auto or _asked(backend) not in ("auto", "torch"):
                raise
            device, why = "cpu", str(e).partition(";")[0]
    chosen = choose_backend(backend, device.partition(":")[0])
    if chosen == "cuda" and plan.inputs > CUDA_MODELS and not plan.method.matrix:
        said = f"backend cuda: takes {CUDA_MODELS} models, there are {plan.inputs}"
        if _asked(backend) == "cuda":
            raise BackendError(f"{said}; use triton, torch or --device cpu")
        chosen, why = "torch", f"{why}; {said}"
    return Place(chosen, device if gpu is None else gpu.name, why, threads, gpu)


def _start(device: str, limit: int | None, least: int) -> Gpu:
    """The GPU, as far as it has ``least`` bytes for a merge.

    Raises:
        BackendError: it does not, or CUDA cannot use it: others have it for themselves, or all of its memory.
    """
    try:
        gpu = Gpu(device if ":" in device else _current(), limit)
    except SemeError:
        raise
    except RuntimeError as e:
        raise BackendError(f"device {device}: {str(e).partition(chr(10))[0]}; free it, or use --device cpu") from e
    if gpu.limit < least:
        raise BackendError(f"device {gpu.name}: {format_size(gpu.limit)} of its memory are for a merge; free some")
    return gpu


def _asked(backend: str) -> str:
    return os.environ.get("SEME_BACKEND", "auto") if backend == "auto" else backend


def _current() -> str:
    import torch

    return f"cuda:{torch.cuda.current_device()}"


def _unusable(backend: str) -> str | None:
    """Why no GPU can be used with this backend; None if one can."""
    reason = why_none()
    if reason is not None:
        return reason
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    candidates = ("triton", "cuda") if backend == "auto" else (backend,)
    reasons = [why_not(c, "cuda") for c in candidates]
    return None if None in reasons else reasons[0]


def _auto(plan: Plan, threads: int, backend: str) -> tuple[str, str]:
    """The device for a plan, and why."""
    if backend == "cpu":
        return "cpu", "backend cpu works there"
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu", "TRITON_INTERPRET=1"
    reason = _unusable(backend)
    if reason is not None:
        return "cpu", reason
    if backend == "cuda":
        return "cuda", "backend cuda works there"
    seconds = cpu_seconds(plan, threads)
    said = f"about {seconds:.0f} s of computing on {threads} CPU thread(s)"
    if seconds > 2 * START_SECONDS:
        return "cuda", said
    return "cpu", f"{said}, a GPU takes about {START_SECONDS:.0f} s to start"


def cpu_seconds(plan: Plan, threads: int) -> float:
    """A rough estimate of the time a merge would take to compute on CPU threads."""
    if not plan.method.matrix:
        return plan.bytes_read / CPU_BYTES / threads
    flops = 0.0
    for t in plan.tensors:
        if not t.copy and len(t.spec.shape) > 1:
            flops += 8.0 * t.spec.numel * min(t.spec.shape[-2:]) * len(t.group.experts)
    return flops / CPU_FLOPS / threads


class Gpu:
    """One GPU and the bytes of it that a merge may hold; allocations beyond raise :class:`OutOfDeviceMemory`.

    Attributes:
        name: cuda:N.
        limit: bytes for everything the merge holds there.
        peak: bytes that it held at most.
    """

    def __init__(self, name: str, limit: int | None = None) -> None:
        self.name = name
        free, total = self.memory()
        self.limit = int(SHARE * free) if limit is None else limit
        if self.limit > total:
            raise ConfigError(f"gpu_memory: {format_size(self.limit)}; {name} has {format_size(total)}")
        self.peak = self._held = self._kept = 0
        self._lock = threading.RLock()  # the garbage collector may give memory back in the midst of it
        self._copies, self._results, self._pool = self.stream(), self.stream(), self.stream()

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and in total."""
        import torch

        free, total = torch.cuda.mem_get_info(self.name)
        return int(free), int(total)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory as bytes, which must not be in use when it is given back.

        torch keeps what it is given back for the stream that asked for it. All workers ask in the name of one, lest
        each keeps as much as it ever held.
        """
        import torch

        with self.on(self._pool):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.name)

    def empty(self, nbytes: int) -> Memory:
        """A piece of the limit.

        Raises:
            OutOfDeviceMemory: it is used up, or the GPU is full.
        """
        with self._lock:
            if self._held + nbytes > self.limit:
                raise OutOfDeviceMemory(f"{self.name}: {format_size(self.limit)} do not hold {nbytes} bytes more")
            self._held += nbytes
            self.peak = max(self.peak, self._held)
        try:
            with self.translated():
                return Memory(self, self.allocate(nbytes))
        except BaseException:
            self.give(nbytes)
            raise

    def keep(self, memories: Sequence[Memory]) -> bool:
        """True if these may stay where workers do without them: all have room for their buffers beside what stays."""
        nbytes = sum(m.tensor.numel() for m in memories)
        with self._lock:
            if self._kept + nbytes > (1 - BUFFER_SHARE) * self.limit:
                return False
            self._kept += nbytes
            for memory in memories:
                memory.kept = True
        return True

    def give(self, nbytes: int, kept: bool = False) -> None:
        """Count bytes as free again."""
        with self._lock:
            self._held -= nbytes
            self._kept -= nbytes * kept

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn what torch and the CUDA runtime say of too little memory into :class:`OutOfDeviceMemory`."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError as e:
            raise OutOfDeviceMemory(f"{self.name}: out of memory") from e
        except RuntimeError as e:
            if "out of memory" not in str(e) and "ALLOC_FAILED" not in str(e):  # the latter of cuBLAS and cuSOLVER
                raise
            raise OutOfDeviceMemory(f"{self.name}: out of memory") from e

    @contextmanager
    def metered(self) -> Iterator[None]:
        """While what torch itself asks for counts: it is refused more than the limit, and ``peak`` is what it held."""
        import torch

        torch.cuda.empty_cache()
        before, most = torch.cuda.memory_allocated(self.name), torch.cuda.get_per_process_memory_fraction(self.name)
        share = (torch.cuda.memory_reserved(self.name) + self.limit) / self.memory()[1]
        torch.cuda.set_per_process_memory_fraction(min(most, share), self.name)
        torch.cuda.reset_peak_memory_stats(self.name)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(most, self.name)
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.name) - before)

    def stream(self) -> Any:
        """A new CUDA stream."""
        import torch

        return torch.cuda.Stream(self.name)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Work of this thread goes to ``stream``."""
        import torch

        # A stream alone would make the thread's device the current one afterwards, and start that as well.
        with torch.cuda.device(self.name), torch.cuda.stream(stream):
            yield

    def empty_cache(self) -> None:
        """Give the driver what torch keeps for itself."""
        import torch

        torch.cuda.empty_cache()

    def pin(self, buffer: Buffer) -> Callable[[], None]:
        """Pin memory, so that copies run by themselves and at the full rate; gives what undoes it.

        Where the system allows no more pinned memory the copies are slower, and nothing else changes.
        """
        import torch

        runtime = torch.cuda.cudart()
        with torch.cuda.device(self.name):
            failed = int(runtime.cudaHostRegister(buffer.address, len(buffer.memory), 0)) != 0
            if failed:  # the error is told once more, to whoever launches the next kernel
                with suppress(RuntimeError):
                    torch.zeros(1, device=self.name)

        def undo() -> None:
            if not failed:
                with torch.cuda.device(self.name):
                    runtime.cudaHostUnregister(buffer.address)

        return undo

    def upload(self, read: Callable[[torch.Tensor], None], numel: int, dtype: torch.dtype) -> torch.Tensor:
        """``numel`` elements that ``read`` fills in on the CPU, on the GPU; for the stream of the main thread.

        Only this thread waits, so what a thread reads ahead is copied while the GPU computes.
        """
        import torch

        host = torch.empty(numel, dtype=dtype, pin_memory=True)
        read(host)
        with self.on(self._copies):
            moved = host.to(self.name, non_blocking=True)
        self._copies.synchronize()
        moved.record_stream(torch.cuda.default_stream(self.name))
        return moved

    def download(self, values: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        """A copy in CPU memory, and what waits until it is there. ``values`` must not change until then."""
        import torch

        values = values.contiguous()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._results.wait_stream(torch.cuda.current_stream(self.name))
        with self.on(self._results):
            host.copy_(values, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._results)
        values.record_stream(self._results)
        return host, done.synchronize


class Memory:
    """Device memory that counts towards the limit of its GPU for as long as it lives."""

    def __init__(self, gpu: Gpu, tensor: torch.Tensor) -> None:
        self._gpu, self.tensor, self.kept = gpu, tensor, False

    def __del__(self) -> None:
        self._gpu.give(self.tensor.numel(), self.kept)

    def view(self, numel: int, dtype: DType) -> torch.Tensor:
        """Its first elements."""
        return self.tensor[: numel * dtype.itemsize].view(dtype.to_torch())


class GpuRuntime(Runtime):
    """The buffers of one worker in pinned memory and on the GPU, and its stream."""

    def __init__(self, n_inputs: int, chunk_bytes: int, gpu: Gpu, backend: str) -> None:
        super().__init__(n_inputs, chunk_bytes)
        self.gpu, self.backend = gpu, backend
        self._stream = gpu.stream()
        self._own: dict[int, Memory] = {}
        self._loaded: dict[int, Memory] = {}
        self._unpin = [gpu.pin(buffer) for buffer in (*self.inputs, self.output)]

    def load(self, inputs: Sequence[tuple[int, DType]], numel: int) -> None:
        """As :meth:`Runtime.load`; the copies are queued."""
        self._loaded.clear()
        with self.gpu.translated(), self.gpu.on(self._stream):
            for i, dtype in inputs:
                self._own[i] = self._at_least(numel * dtype.itemsize, self._own.pop(i, None))
                host = host_tensor(self.inputs[i].address, numel, dtype)
                self._own[i].view(numel, dtype).copy_(host, non_blocking=True)
                self._loaded[i] = self._own[i]

    def _at_least(self, nbytes: int, held: Memory | None) -> Memory:
        if held is not None and held.tensor.numel() >= nbytes:
            return held
        del held  # before the larger one is asked for
        return self.gpu.empty(nbytes)

    def keep(self, inputs: Sequence[tuple[int, DType]]) -> Mapping[int, Memory]:
        """As :meth:`Runtime.keep`, if there is room for others in their place."""
        if not self.gpu.keep([self._own[i] for i, _ in inputs]):
            return {}
        return {i: self._own.pop(i) for i, _ in inputs}

    def use(self, kept: Mapping[int, Memory]) -> None:
        """As :meth:`Runtime.use`."""
        self._loaded.update(kept)

    def recover(self) -> None:
        """As :meth:`Runtime.recover`, once nothing of it is in use."""
        self._stream.synchronize()
        self._own.clear()
        self._loaded.clear()
        self.gpu.empty_cache()

    def close(self) -> None:
        """As :meth:`Runtime.close`."""
        self.recover()
        for undo in self._unpin:
            undo()

    def run(
        self, op: Op, params: Params, inputs: Sequence[tuple[int, DType]], numel: int, out: View, shape: Sequence[int]
    ) -> None:
        """As :meth:`Runtime.run`; when it returns nothing of it is under way on the GPU."""
        host = host_tensor(*out)
        with self.gpu.translated(), self.gpu.on(self._stream):
            tensors = [self._loaded[i].view(numel, dtype) for i, dtype in inputs]
            self._own[RESULT] = self._at_least(host.nbytes, self._own.pop(RESULT, None))
            result = self._own[RESULT].view(out.numel, out.dtype)
            if op.accumulates:
                result.zero_()
            op.run(tensors, result.view(tuple(shape)), self.backend, 0, params)
            if op.accumulates:
                host += result.cpu()
            else:
                host.copy_(result, non_blocking=True)
            self._stream.synchronize()
