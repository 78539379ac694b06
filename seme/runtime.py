"""Where the chunks of a merge are computed: on the CPU kernels without torch, or on any backend through torch.

A runtime holds the buffers of one worker. The CPU kernels work on anonymous memory directly, so that a merge
needs neither torch's start-up nor its memory; every other backend gets the same bytes as torch tensors.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from seme.dtypes import DType
from seme.errors import BackendError
from seme.native import View
from seme.ops._op import Op, Params, choose_backend, why_not


class Buffer:
    """Anonymous memory of a fixed size, at a page boundary."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
        self.memory = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))


class Runtime:
    """The buffers of one worker and the CPU kernels that run on them.

    Attributes:
        inputs: one buffer per model; an op reads those it is told to.
        output: the buffer for what a writing op makes.
    """

    def __init__(self, n_inputs: int, chunk_bytes: int) -> None:
        self.inputs = [Buffer(chunk_bytes) for _ in range(n_inputs)]
        self.output = Buffer(chunk_bytes)

    def run(
        self, op: Op, params: Params, inputs: Sequence[tuple[int, DType]], numel: int, out: View, shape: Sequence[int]
    ) -> None:
        """Run an op on the first ``numel`` elements of input buffers.

        Args:
            op: the op.
            params: what its check returned.
            inputs: number of the buffer and dtype of its elements, in the op's order.
            numel: elements of each.
            out: memory of the result; an accumulating op adds to it.
            shape: shape of the result.
        """
        views = [View(self.inputs[i].address, numel, dtype) for i, dtype in inputs]
        op.native(views, out, 1, **params)


_INTERPRETER = threading.Lock()


class TorchRuntime(Runtime):
    """The same through torch, on any backend and device."""

    def __init__(self, n_inputs: int, chunk_bytes: int, backend: str, device: str, threads: int) -> None:
        super().__init__(n_inputs, chunk_bytes)
        self.backend, self.device, self.threads = backend, device, threads
        # Triton on the CPU is its interpreter, which patches the language while it runs: one at a time.
        interprets = backend == "triton" and device == "cpu"
        self._turn: AbstractContextManager[object] = _INTERPRETER if interprets else nullcontext()

    def run(
        self, op: Op, params: Params, inputs: Sequence[tuple[int, DType]], numel: int, out: View, shape: Sequence[int]
    ) -> None:
        """As :meth:`Runtime.run`; inputs go to the device and the result comes back."""
        import torch

        tensors = [
            torch.frombuffer(self.inputs[i].memory[: numel * d.itemsize], dtype=d.to_torch()).to(self.device)
            for i, d in inputs
        ]
        raw = (ctypes.c_char * (out.numel * out.dtype.itemsize)).from_address(out.address)
        host = torch.frombuffer(raw, dtype=out.dtype.to_torch()).view(tuple(shape))
        result = host.to(self.device)
        with self._turn:
            op.run(tensors, result, self.backend, self.threads, params)
        if result is not host:
            host.copy_(result)


def choose(backend: str, device: str, threads: int) -> tuple[str, Callable[[int, int], Runtime]]:
    """The backend a merge runs on and a maker of its runtimes (``n_inputs``, ``chunk_bytes``).

    Raises:
        BackendError: the backend does not work on the device here.
    """
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise BackendError(f"device {device}: expected cpu, cuda or cuda:N")
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise BackendError(f"device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    chosen = choose_backend(backend, kind)
    reason = why_not(chosen, kind)
    if reason is not None:
        raise BackendError(f"backend {chosen}: {reason}")
    if chosen == "cpu":
        return chosen, Runtime
    return chosen, lambda n, size: TorchRuntime(n, size, chosen, device, threads)
