"""Where the chunks of a merge are computed: on the CPU kernels without torch, or on any backend through torch.

A :class:`Place` is a backend on a device. It makes the runtimes: each holds the buffers of one worker. The CPU kernels
work on anonymous memory directly, so that a merge needs neither torch's start-up nor its memory; other backends on the
CPU get the same bytes as torch tensors. GPUs are in :mod:`seme.gpu`.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seme.dtypes import DType
from seme.errors import BackendError
from seme.native import View
from seme.ops._op import Op, Params

if TYPE_CHECKING:
    import torch

    from seme.gpu import Gpu


class OutOfDeviceMemory(BackendError):
    """A chunk does not fit into what is left of the device's memory; a smaller one may."""


class Buffer:
    """Anonymous memory of a fixed size, at a page boundary."""

    def __init__(self, nbytes: int) -> None:
        self._map = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE))
        self.memory = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))


def host_tensor(address: int, numel: int, dtype: DType) -> torch.Tensor:
    """CPU memory as a flat tensor."""
    import torch

    raw = (ctypes.c_char * (numel * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype.to_torch())


class Runtime:
    """The buffers of one worker and the CPU kernels that run on them.

    Attributes:
        inputs: one buffer per model; an op reads those it is told to.
        output: the buffer for what a writing op makes.
    """

    def __init__(self, n_inputs: int, chunk_bytes: int) -> None:
        self.inputs = [Buffer(chunk_bytes) for _ in range(n_inputs)]
        self.output = Buffer(chunk_bytes)

    def load(self, inputs: Sequence[tuple[int, DType]], numel: int) -> None:
        """Bring what was read into these input buffers to where the ops run.

        Raises:
            OutOfDeviceMemory: there is no room for it.
        """

    def keep(self, inputs: Sequence[tuple[int, DType]]) -> Mapping[int, Any]:
        """Hand out what was loaded, for :meth:`use` by any worker in a later pass over the same chunk; may be empty."""
        return {}

    def use(self, kept: Mapping[int, Any]) -> None:
        """Take what was kept of a chunk as if it had been loaded."""

    def recover(self) -> None:
        """Give back all memory of the device, after there was too little."""

    def close(self) -> None:
        """Give back everything."""

    def run(
        self, op: Op, params: Params, inputs: Sequence[tuple[int, DType]], numel: int, out: View, shape: Sequence[int]
    ) -> None:
        """Run an op on the first ``numel`` elements of loaded inputs.

        Args:
            op: the op.
            params: what its check returned.
            inputs: number of the buffer and dtype of its elements, in the op's order.
            numel: elements of each.
            out: CPU memory of the result; an accumulating op adds to it.
            shape: shape of the result.

        Raises:
            OutOfDeviceMemory: there is no room for it; ``out`` is as it was.
        """
        views = [View(self.inputs[i].address, numel, dtype) for i, dtype in inputs]
        op.native(views, out, 1, **params)


class TorchRuntime(Runtime):
    """The same through torch, on any backend that works on the CPU."""

    def __init__(self, n_inputs: int, chunk_bytes: int, backend: str, threads: int) -> None:
        super().__init__(n_inputs, chunk_bytes)
        self.backend, self.threads = backend, threads

    def run(
        self, op: Op, params: Params, inputs: Sequence[tuple[int, DType]], numel: int, out: View, shape: Sequence[int]
    ) -> None:
        """As :meth:`Runtime.run`."""
        tensors = [host_tensor(self.inputs[i].address, numel, dtype) for i, dtype in inputs]
        op.run(tensors, host_tensor(*out).view(tuple(shape)), self.backend, self.threads, params)


@dataclass(frozen=True)
class Place:
    """A backend on a device, and why it was chosen.

    Attributes:
        backend: cpu, torch, triton or cuda.
        device: cpu or cuda:N.
        why: the reason in words, for the plan.
        threads: CPU threads of backends that take them.
        gpu: the GPU, with what the merge may use of it; None on the CPU.
    """

    backend: str
    device: str
    why: str
    threads: int = 1
    gpu: Gpu | None = None

    def runtime(self, n_inputs: int, chunk_bytes: int) -> Runtime:
        """Buffers for a worker that merges ``n_inputs`` models in chunks of ``chunk_bytes`` per model."""
        if self.gpu is not None:
            from seme.gpu import GpuRuntime

            return GpuRuntime(n_inputs, chunk_bytes, self.gpu, self.backend)
        if self.backend == "cpu":
            return Runtime(n_inputs, chunk_bytes)
        return TorchRuntime(n_inputs, chunk_bytes, self.backend, self.threads)
