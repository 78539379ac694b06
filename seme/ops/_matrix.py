"""What every matrix op is made of: 2-D operands with strides, results held to an error bound.

An element-wise op gives the same bits on every backend; the sums of a matrix product have no fixed order, so a
matrix op is held to an error bound instead: at most twice the error of plain torch in the same working dtype, against
a float64 reference. The same inputs on the same backend with the same number of threads give the same bytes.

The working dtype (*acc*) is float32, and float64 if an operand is float64. Task vectors are formed in it, so they are
never rounded to bfloat16 on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seme import dtypes, native
from seme.dtypes import DType
from seme.errors import BackendError, OpError
from seme.ops._op import Params, Spec, choose_backend, launcher

if TYPE_CHECKING:
    import torch

    Operand = torch.Tensor | list[torch.Tensor]

Plan = tuple[Params, tuple[Spec, ...]]
"""What a check returns: the parameters that backends get, and the results' shapes and dtypes."""


@dataclass(frozen=True)
class MatrixOp:
    """One matrix op and its backends.

    Attributes:
        name: its name in ``torch.ops.seme``.
        operands: its tensors in the schema language, e.g. ``Tensor base, Tensor[] tensors``.
        results: names of its results; ``("out",)`` for one.
        arguments: its other arguments in the schema language.
        check: ``check(*specs, **arguments) -> Plan``, one :class:`Spec` (or a list of them) per operand; raises
            :class:`OpError`. Runs before every backend and in the fake kernel.
        reference: ``reference(*operands, **params)`` in plain torch, in the working dtype: a tensor, or a tuple of
            them, one per result.
        cpu: ``cpu(*operands, *results, threads, **params)`` on CPU tensors of any strides: torch's matrix product,
            and C++ for what is around it.
        accumulates: adds to its results instead of overwriting them; new ones start at zero.
        cuda: there is a CUDA C++ kernel besides the Triton one.
    """

    name: str
    operands: str
    results: tuple[str, ...]
    arguments: str
    check: Callable[..., Plan]
    reference: Callable[..., Any]
    cpu: Callable[..., None]
    accumulates: bool = False
    cuda: bool = False

    @property
    def operand_names(self) -> tuple[str, ...]:
        """Its tensors, as they are called in the schema."""
        return tuple(operand.split()[-1] for operand in self.operands.split(","))

    @property
    def schema(self) -> str:
        """Schema of the functional variant; the ``.out`` variant takes the results and returns nothing."""
        own = f"{self.arguments}, " if self.arguments else ""
        return f'{self.operands}, *, {own}str backend="auto", int threads=0'

    def __call__(
        self,
        *operands: torch.Tensor | Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor] | None = None,
        backend: str = "auto",
        threads: int = 0,
        **arguments: Any,
    ) -> Any:
        """Run the op through ``torch.ops.seme``: a tensor, or a tuple of them if there are several results."""
        from seme.ops import library

        packet = library.packet(self.name)
        bound = [list(o) if isinstance(o, (list, tuple)) else o for o in operands]
        if outs is None:
            return packet(*bound, backend=backend, threads=threads, **arguments)
        if len(outs) != len(self.results):
            raise OpError(f"{self.name}: out has {len(outs)} tensors, expected {', '.join(self.results)}")
        results = dict(zip(self.results, outs))
        packet.out(*bound, backend=backend, threads=threads, **results, **arguments)
        return tuple(outs) if len(outs) > 1 else outs[0]

    def run(
        self, operands: list[Operand], outs: list[torch.Tensor], backend: str, threads: int, params: Params
    ) -> None:
        """Run on the named backend; the operands have passed ``check()``."""
        import torch

        operands = [[t.detach() for t in o] if isinstance(o, list) else o.detach() for o in operands]
        chosen = choose_backend(backend, outs[0].device.type)
        if chosen == "cuda" and not self.cuda:
            if "cuda" in (backend, os.environ.get("SEME_BACKEND")):
                raise BackendError(f"backend cuda: {self.name} has no CUDA C++ kernel; use triton or torch")
            chosen = "torch"  # auto, on a machine without Triton
        if chosen == "torch":
            found = self.reference(*operands, **params)
            for out, value in zip(outs, found if isinstance(found, tuple) else (found,)):
                out.add_(value) if self.accumulates else out.copy_(value)
        elif chosen == "cpu":
            with torch.no_grad(), torch_threads(threads) as count:
                self.cpu(*operands, *outs, threads=count, **params)
        else:
            with torch.no_grad(), torch.cuda.device_of(outs[0]):  # GPU kernels run on the current device
                launcher(self.name, chosen)(*operands, *outs, **params)


@contextmanager
def torch_threads(threads: int) -> Iterator[int]:
    """torch's matrix product with that many threads; 0 leaves its number as it is. Yields the number."""
    import torch

    before = torch.get_num_threads()
    if threads in (0, before):
        yield before
        return
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def working_dtype(*operands: Spec | Sequence[Spec]) -> DType:
    """float64 if an operand is float64, else float32: the dtype of sums, and of results that are not weights."""
    specs = [s for o in operands for s in ([o] if isinstance(o, Spec) else o)]
    return dtypes.arithmetic(dtypes.promote([s.dtype for s in specs]))


def check_matrix(op: str, name: str, spec: Spec, shape: Sequence[int | None], like: str = "") -> None:
    """A floating-point operand of the given shape; None stands for any size, ``like`` says where the shape is from.

    Raises:
        OpError: names op and operand, what was found and what was expected.
    """
    if not spec.dtype.mergeable:
        names = ", ".join(str(d) for d in dtypes.MERGEABLE)
        raise OpError(f"{op}: {name} is {spec.dtype}; supported: {names}")
    fits = len(spec.shape) == len(shape) and all(e in (None, f) for e, f in zip(shape, spec.shape))
    if not fits:
        wanted = ", ".join("any" if e is None else str(e) for e in shape)
        raise OpError(f"{op}: {name} has shape {list(spec.shape)}, expected [{wanted}]{like and f' {like}'}")


def check_experts(op: str, base: Spec, tensors: Sequence[Spec], name: str = "tensors") -> None:
    """A base matrix and at least one tensor of its shape."""
    check_matrix(op, "base", base, (None, None))
    if not tensors:
        raise OpError(f"{op}: {name} is empty, expected at least one tensor of base's shape {list(base.shape)}")
    for i, spec in enumerate(tensors):
        check_matrix(op, f"{name}[{i}]", spec, base.shape, "as base has")


def acc_of(*operands: Operand) -> torch.dtype:
    """The working dtype of tensors, see :func:`working_dtype`."""
    import torch

    tensors = [t for o in operands for t in (o if isinstance(o, list) else [o])]
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# The CPU kernels: torch multiplies tiles, C++ (csrc/cpu: matrix, elect, nearest, erase) does what is around it.
# Tiles bound the memory besides operands and results; their sizes were found by measuring (benchmarks/matrix.py).

TILE = 1 << 21
"""Elements of a tile of task vectors: 8 MiB of float32."""
BLOCKS = 16
"""Block rows of a symmetric product; 16 of them compute 17/32 of the square."""


def tiles(count: int, step: int) -> Iterator[slice]:
    """Slices of at most ``step`` that cover ``range(count)``."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def tile_rows(width: int) -> int:
    """Rows of a tile of that width."""
    return max(64, min(4096, TILE // max(1, width)))


def workspace(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for tiles of up to that size."""
    import torch

    return torch.empty(rows * cols, dtype=dtype)


def raw(matrix: torch.Tensor) -> tuple[int, int, int, int, int]:
    """A matrix whose rows are contiguous, as the compiled module takes it."""
    return matrix.data_ptr(), *matrix.shape, matrix.stride(0), dtypes.from_torch(matrix.dtype).native


def by_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or a copy of it, with contiguous rows that do not overlap."""
    rows, cols = matrix.shape
    good = matrix.stride(1) == 1 and (rows <= 1 or matrix.stride(0) >= cols)
    return matrix if good else matrix.contiguous()


def is_by_columns(matrix: torch.Tensor) -> bool:
    """True for a transposed view: contiguous columns, rows that are not."""
    rows, cols = matrix.shape
    return matrix.stride(0) == 1 and matrix.stride(1) != 1 and (cols <= 1 or matrix.stride(1) >= rows)


def task_vectors(
    base: torch.Tensor, tensors: Sequence[torch.Tensor], memory: torch.Tensor, threads: int
) -> torch.Tensor:
    """``tensors[m] - base`` below one another, [n rows, cols], stored as the operands are (by rows or by columns)."""
    rows, cols = base.shape
    count = len(tensors) * rows
    turned = is_by_columns(base) and all(is_by_columns(t) for t in tensors)
    flat = memory[: count * cols]
    found = flat.view(cols, count).T if turned else flat.view(count, cols)
    for m, tensor in enumerate(tensors):
        parts = [base, tensor, found[m * rows : (m + 1) * rows]]
        if turned:
            parts = [part.T for part in parts]
        alive = [by_rows(part) for part in parts]  # a copy must outlive the call that gets its address
        native.module().subtract(*map(raw, alive), threads)
    return found


def add_scaled(base: torch.Tensor, delta: torch.Tensor, scale: float, out: torch.Tensor, threads: int) -> None:
    """``out = base + scale * delta``, rounded once."""
    if is_by_columns(out):
        base, delta, out = base.T, delta.T, out.T
    origin, term, target = by_rows(base), by_rows(delta), by_rows(out)
    native.module().add_scaled(raw(origin), raw(term), scale, raw(target), threads)
    if target is not out:
        out.copy_(target)


def like(out: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """A matrix of the shape of ``out`` in the workspace, stored by columns if ``out`` is."""
    rows, cols = out.shape
    flat = memory[: rows * cols]
    return flat.view(cols, rows).T if is_by_columns(out) else flat.view(rows, cols)


def add_upper(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Adds the diagonal blocks of the symmetric ``left^T @ right`` and what is right of them to ``out``."""
    width = out.shape[0]
    for block in tiles(width, block_of(width)):
        out[block, block.start :].addmm_(left[:, block].T, right[:, block.start :])


def block_of(width: int) -> int:
    """Width of the diagonal blocks of :func:`add_upper`: whole cache lines, whatever the width of the matrix."""
    return max(128, -(-width // (64 * BLOCKS)) * 64)


def mirror_upper(out: torch.Tensor) -> None:
    """Copies the upper half of a square matrix to the lower one."""
    width = out.shape[0]
    for block in tiles(width, block_of(width)):
        square = out[block, block]
        square.copy_(square.triu() + square.triu(1).T)
        out[block.stop :, block].copy_(out[block, block.stop :].T)
