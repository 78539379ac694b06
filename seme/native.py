"""The compiled modules ``_C`` (CPU) and ``_C_cuda``, or the reason why they are not there.

Nothing here imports torch: the engine hands memory to the kernels as :class:`View`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

from seme.dtypes import DType
from seme.errors import BackendError

BLOCK = 8192
"""Elements per block of a reduction (``kBlock`` in ``csrc/seme.h``). Chunks begin at a multiple of it."""


class View(NamedTuple):
    """Contiguous memory handed to a kernel: address, number of elements, dtype."""

    address: int
    numel: int
    dtype: DType

    def raw(self) -> tuple[int, int, int]:
        """The form that the compiled modules take."""
        return self.address, self.numel, self.dtype.native


_loaded: dict[str, ModuleType | str] = {}


def _try(name: str) -> ModuleType | str:
    if name not in _loaded:
        try:
            module = importlib.import_module(f"seme.{name}")
            if name == "_C" and module.BLOCK != BLOCK:
                _loaded[name] = "built from other sources (block sizes differ): reinstall seme"
            else:
                _loaded[name] = module
        except ImportError as e:
            _loaded[name] = str(e)
    return _loaded[name]


def why_not(name: str) -> str | None:
    """None if the compiled module ``_C`` or ``_C_cuda`` loads, else the reason it does not."""
    module = _try(name)
    return module if isinstance(module, str) else None


def module(name: str = "_C") -> Any:
    """The compiled module; :class:`BackendError` with the reason and the remedy if it is not there."""
    found = _try(name)
    if isinstance(found, str):
        switch = "SEME_CUDA=1 (needs nvcc)" if name == "_C_cuda" else "SEME_NATIVE=1 (needs a C++17 compiler)"
        raise BackendError(f"the compiled module seme.{name} is missing: {found}; install with {switch} to build it")
    return found
