"""What every op is made of, and how a call finds its backend.

An op is one file of this package. It holds the formula, ``check()``, ``reference()`` in plain torch and the
calls of its kernels; an :class:`Op` ties them together, and :mod:`seme.ops.library` registers it with
``torch.library``. The order of a call: ``check()`` -> backend -> kernel on contiguous memory.
"""

from __future__ import annotations

import importlib
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from seme import dtypes, native
from seme.dtypes import DType
from seme.errors import BackendError, OpError
from seme.native import View

if TYPE_CHECKING:
    import torch

BACKENDS = ("auto", "torch", "cpu", "triton", "cuda")
TRITON = threading.Lock()
"""Held while a Triton kernel is launched. A kernel that one thread is still loading looks loaded to another, which then
launches nothing or fails; and the interpreter patches the language while it runs."""


class Spec(NamedTuple):
    """Shape and dtype of a tensor: all that a check needs to know."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        n = 1
        for size in self.shape:
            n *= size
        return n


Params = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """One op and its backends.

    Attributes:
        name: its name in ``torch.ops.seme``.
        arguments: its own arguments in the schema language, after the tensors.
        check: ``check(specs, **arguments) -> params``; raises :class:`OpError`. Runs before every backend and
            in the fake kernel. ``params`` is what the backends get: defaults filled in, scalars rounded.
        result: ``result(specs, params) -> Spec`` of the output.
        reference: ``reference(tensors, **params) -> Tensor``, the written formula in plain torch.
        native: ``native(views, out, threads, **params)``: the C++ kernel; imports no torch.
        has_base: the first tensor is the base that task vectors are taken from.
        accumulates: adds to ``out`` instead of overwriting it (integer results only, so order cannot matter).
        ordered: the output's leading axis counts blocks of :meth:`quantum` elements.
        positional: it takes ``offset``: the index in the tensor of the first element that it is given.
    """

    name: str
    arguments: str
    check: Callable[..., Params]
    result: Callable[[Sequence[Spec], Params], Spec]
    reference: Callable[..., torch.Tensor]
    native: Callable[..., None]
    has_base: bool = False
    accumulates: bool = False
    ordered: bool = False
    positional: bool = False

    @staticmethod
    def quantum(params: Params) -> int:
        """Elements that one call must not part: its ``row``, if it has one, else :data:`seme.native.BLOCK`."""
        return params.get("row") or native.BLOCK

    @property
    def operand_names(self) -> tuple[str, ...]:
        """Its tensors, as they are called in the schema."""
        return ("base", "tensors") if self.has_base else ("tensors",)

    @property
    def results(self) -> tuple[str, ...]:
        """The name of its result."""
        return ("out",)

    @property
    def schema(self) -> str:
        """Schema of the functional variant; the ``.out`` variant has ``Tensor(a!) out`` and returns nothing."""
        tensors = "Tensor base, Tensor[] tensors" if self.has_base else "Tensor[] tensors"
        own = f"{self.arguments}, " if self.arguments else ""
        return f'{tensors}, *, {own}str backend="auto", int threads=0'

    def __call__(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        out: torch.Tensor | None = None,
        backend: str = "auto",
        threads: int = 0,
        **arguments: Any,
    ) -> torch.Tensor:
        """Run the op through ``torch.ops.seme``; ``tensors[0]`` is the base if the op has one."""
        from seme.ops import library

        if not tensors:  # the dispatcher would have nothing to go by
            raise OpError(f"{self.name}: no tensors given")
        packet = library.packet(self.name)
        split = (tensors[0], list(tensors[1:])) if self.has_base else (list(tensors),)
        if out is None:
            result: torch.Tensor = packet(*split, backend=backend, threads=threads, **arguments)
            return result
        packet.out(*split, backend=backend, threads=threads, out=out, **arguments)
        return out

    def run(self, tensors: list[torch.Tensor], out: torch.Tensor, backend: str, threads: int, params: Params) -> None:
        """Run on the named backend; the tensors have passed ``check()``."""
        import torch

        backend = choose_backend(backend, out.device.type)
        if backend == "torch":
            result = self.reference(tensors, **params)
            out.add_(result) if self.accumulates else out.copy_(result)
            return
        flat = [t.detach().contiguous().view(-1) for t in tensors]
        target = out if out.is_contiguous() else out.clone(memory_format=torch.contiguous_format)
        if backend == "cpu":
            views = [view(t) for t in flat]
            self.native(views, view(target.view(-1)), threads or torch.get_num_threads(), **params)
        else:
            with torch.cuda.device_of(out):  # GPU kernels run on the current device
                launcher(self.name, backend)(flat, target.view(-1), **params)
        if target is not out:
            out.copy_(target)


def view(tensor: torch.Tensor) -> View:
    """A contiguous CPU tensor as the kernels see it. The caller keeps the tensor alive."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise OpError(f"expected a contiguous CPU tensor, got {tuple(tensor.stride())} on {tensor.device}")
    dtype = dtypes.from_torch(tensor.dtype)
    return View(tensor.data_ptr(), tensor.numel(), dtype)


def launcher(name: str, backend: str) -> Callable[..., None]:
    """``launch(flat_tensors, flat_out, **params)`` of a Triton kernel module or of the CUDA extension."""
    if backend == "cuda":
        found: Callable[..., None] = vars(importlib.import_module("seme.ops.cuda"))[name]
        return found
    module = importlib.import_module(f"seme.kernels.{name}")

    def launch(*tensors: Any, **params: Any) -> None:
        with TRITON:
            module.launch(*tensors, **params)

    return launch


def why_not(backend: str, device: str) -> str | None:
    """None if ``backend`` can run on tensors of ``device`` here, else the reason and the remedy."""
    if backend == "torch":
        return None
    if backend == "cpu":
        if device != "cpu":
            return f"backend cpu works on CPU tensors, not on {device}; move them or use triton"
        return native.why_not("_C")
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'seme[triton]'"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton runs on CPU tensors in its interpreter only: set TRITON_INTERPRET=1 before the first import"
        if device == "cuda" and not ("CC" in os.environ or shutil.which("gcc") or shutil.which("clang")):
            return "Triton builds its launchers with a C compiler: install gcc or clang, or set CC"
        return None
    if backend == "cuda":
        if device != "cuda":
            return f"backend cuda works on CUDA tensors, not on {device}"
        return native.why_not("_C_cuda")
    return f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}"


_warned = False


def choose_backend(backend: str, device: str) -> str:
    """The backend a call runs on. ``auto``: ``SEME_BACKEND`` if set, else cpu or triton, else torch.

    Raises:
        BackendError: the backend asked for does not exist or does not work here.
    """
    global _warned
    if backend == "auto":
        backend = os.environ.get("SEME_BACKEND", "auto")
    if backend == "auto":
        preferred = ("cpu",) if device == "cpu" else ("triton", "cuda")
        for candidate in preferred:
            if why_not(candidate, device) is None:
                return candidate
        if not _warned:
            _warned = True
            reason = why_not(preferred[0], device)
            warnings.warn(f"seme: no fast kernels for {device} ({reason}); plain torch is used", stacklevel=3)
        return "torch"
    reason = why_not(backend, device)
    if reason is not None:
        raise BackendError(f"backend {backend}: {reason}")
    return backend


def check_tensors(op: str, specs: Sequence[Spec], compute_dtype: DType | None) -> DType:
    """The checks all ops share: at least one tensor, equal shapes, dtypes we compute with.

    Returns:
        The compute dtype: as given, else float64 if any input is float64, else float32.
    """
    if not specs:
        raise OpError(f"{op}: no tensors given")
    for i, spec in enumerate(specs):
        if spec.shape != specs[0].shape:
            raise OpError(f"{op}: tensor {i} has shape {list(spec.shape)}, tensor 0 has {list(specs[0].shape)}")
        if not spec.dtype.mergeable:
            names = ", ".join(str(d) for d in dtypes.MERGEABLE)
            raise OpError(f"{op}: tensor {i} is {spec.dtype}; supported: {names}")
    if compute_dtype is None:
        return dtypes.arithmetic(dtypes.promote([s.dtype for s in specs]))
    if not compute_dtype.mergeable:
        raise OpError(f"{op}: compute_dtype {compute_dtype} is not a floating-point dtype")
    return compute_dtype


def check_per_tensor(op: str, name: str, values: Sequence[Any], count: int) -> None:
    """One value per (non-base) tensor."""
    if len(values) != count:
        raise OpError(f"{op}: {name} has {len(values)} entries for {count} tensors")
