"""mergekit as an oracle, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("mergekit_worker.py")
PATIENCE = 120
"""Seconds to wait for a reply; the import takes about 5, a merge of the tests' models less than 2."""


class OracleMissing(Exception):
    """mergekit cannot be used here; the text says why."""


class OracleError(Exception):
    """mergekit refused a recipe; the text is its own."""


class Oracle:
    """A worker process; ``variables`` are added to its environment. It is used after :attr:`about` has been read."""

    def __init__(self, log: Path, **variables: str) -> None:
        if importlib.util.find_spec("mergekit") is None:
            raise OracleMissing("mergekit is not installed; it comes with the extra 'test'")
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0", **variables},
            )
        self._buffer = b""

    @cached_property
    def about(self) -> dict[str, Any]:
        """Versions of mergekit and torch, and torch's CPU capability; waits for the import.

        Raises:
            OracleMissing: the import failed.
        """
        reply = self._reply()
        if reply["error"] is not None:
            raise OracleMissing(f"mergekit cannot be imported: {reply['error']}")
        return reply

    @property
    def fused(self) -> bool:
        """Whether torch uses fused multiply-adds there."""
        return self.about["capability"] != "DEFAULT" or platform.machine() not in ("x86_64", "AMD64")

    def merge(self, config: str, out: Path, **options: Any) -> Path:
        """Run a merge and return its folder.

        Raises:
            OracleError: mergekit refused.
        """
        with self.merging(config, out, **options):
            return out

    @contextmanager
    def merging(self, config: str, out: Path, **options: Any) -> Iterator[None]:
        """Run a merge while the body runs; it is done when the body is left.

        Raises:
            OracleError: mergekit refused.
        """
        assert self._process.stdin is not None
        request = {"config": config, "out": str(out), "options": options}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        try:
            yield
        finally:
            error = self._reply()["error"]
        if error is not None:
            raise OracleError(error)

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], PATIENCE)
            data = os.read(descriptor, 65536) if ready else b""
            if not data:
                what = "ended" if ready else f"said nothing for {PATIENCE} s"
                self._process.kill()
                raise RuntimeError(f"the mergekit process {what}:\n{self._log.read_text()[-2000:]}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """End the worker."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
