"""A GPU that is not there: what a merge does on one, done in CPU memory, with a limit and planned faults."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from seme.gpu import Gpu
from seme.runtime import Buffer, Place


class _Stream:
    def synchronize(self) -> None:
        pass


class FakeGpu(Gpu):
    """Counts what it is asked for. ``fails(n)`` says whether the n-th request for memory (from 1) finds none."""

    def __init__(self, limit: int | None = None, total: int = 1 << 30, fails: Callable[[int], bool] = lambda n: False):
        self.total, self.fails = total, fails
        self.requests = self.pinned = self.emptied = 0
        self._counting = threading.Lock()
        super().__init__("cpu", limit)

    def memory(self) -> tuple[int, int]:
        return self.total, self.total

    def _request(self) -> None:
        with self._counting:
            self.requests += 1
            failed = self.fails(self.requests)
        if failed:
            raise torch.OutOfMemoryError("planned")

    def allocate(self, nbytes: int) -> torch.Tensor:
        self._request()
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)  # NaN in every dtype

    def metered(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def stream(self) -> Any:
        return _Stream()

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def empty_cache(self) -> None:
        self.emptied += 1

    def pin(self, buffer: Buffer) -> Callable[[], None]:
        with self._counting:
            self.pinned += 1

        def undo() -> None:
            with self._counting:
                self.pinned -= 1

        return undo

    def upload(self, read: Callable[[torch.Tensor], None], numel: int, dtype: torch.dtype) -> torch.Tensor:
        self._request()
        found = torch.empty(numel, dtype=dtype)
        read(found)
        return found

    def download(self, values: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        """Copied as late as may be: who changes ``values`` too early is found out."""
        host = torch.full_like(values, float("nan"), memory_format=torch.contiguous_format)

        def arrived() -> None:
            with torch.inference_mode():
                host.copy_(values)

        return host, arrived

    @property
    def held(self) -> int:
        return self._held

    @property
    def kept(self) -> int:
        return self._kept

    def place(self, backend: str = "torch") -> Place:
        return Place(backend, "cpu", "a test", gpu=self)
