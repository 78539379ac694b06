"""A merge of whole matrices, as a method writes it.

A method that needs a product over a whole matrix (a Gram matrix, an SVD) is no sequence of passes over chunks of any
size. It is a plain function on a :class:`Stack`: one tensor of the base and of all experts, as the 2-D problems it is
made of or as runs of elements. Whoever drives it says where the elements come from and go to; only some rows of each
model are in memory at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from seme import dtypes
from seme.methods._passes import Group
from seme.roles import Role, TensorRole

if TYPE_CHECKING:
    import torch

    from seme.semantics.bases import SemanticBases

Load = Callable[[int, int, int], "torch.Tensor"]
"""``load(model, start, stop)``: elements [start, stop) of a model's tensor, flat, as they are stored."""
Store = Callable[[int, "torch.Tensor"], None]
"""``store(start, values)``: the output's elements from ``start`` on, flat, in its dtype."""

RUN = 1 << 20
"""Elements per step of element-wise work."""


def _no_bases() -> SemanticBases:
    from seme.errors import ConfigError

    raise ConfigError(
        "base_model: its LM head is needed for semantic bases, and it has none; use sigma: 0, rule: project"
    )


@dataclass
class Context:
    """What a matrix method may use besides the tensor.

    Attributes:
        backend: of the ops.
        device: where they run.
        threads: CPU threads of the ops; 0 takes torch's number.
        workspace: bytes for the rows of all models that are in memory at once.
        bases: gives the semantic bases of the base model.
        report: takes what is worth telling of a tensor: ``report(name, entry)``; None if nobody wants to know.
    """

    backend: str = "auto"
    device: str = "cpu"
    threads: int = 0
    workspace: int = 1 << 26
    bases: Callable[[], SemanticBases] = _no_bases
    report: Callable[[str, dict[str, Any]], None] | None = None

    @functools.cached_property
    def frame(self) -> torch.Tensor:
        """The semantic bases as unit rows [v, d], on the device; kept once they are made."""
        return self.bases().matrix().to(self.device)

    @functools.cached_property
    def dual(self) -> torch.Tensor:
        """Their dual [v, d]."""
        return self.bases().dual().to(self.device)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of every op."""
        return {"backend": self.backend, "threads": self.threads}


class Matrix:
    """One 2-D problem of a stack, oriented as a linear layer's weight: [out, in], inputs along the rows.

    Attributes:
        name: of the tensor, and the place in it if it is a stack of matrices.
        out: rows.
        width: columns: the axis whose second moments are taken.
        latent: the columns are the residual stream.
    """

    def __init__(self, stack: Stack, offset: int, shape: tuple[int, int], flipped: bool, latent: bool) -> None:
        """``shape`` as stored; ``flipped``: the stored matrix is the transpose of this one."""
        self.stack, self.latent = stack, latent
        self.name = f"{stack.group.name}[{offset}]"
        self.out, self.width = shape[::-1] if flipped else shape
        self._offset, self._flipped = offset, flipped
        self._whole: dict[int, torch.Tensor] = {}
        self._result: torch.Tensor | None = None
        models = len(stack.group.inputs)
        widest = max(s.dtype.itemsize for s in stack.group.inputs)
        # Small enough to be read once and kept, of all models, although a method streams it several times.
        self._fits = self.out * self.width * widest * models <= stack.context.workspace

    def zeros(self, *shape: int) -> torch.Tensor:
        """Zeros of the arithmetic type on the device."""
        import torch

        return torch.zeros(shape, dtype=self.stack.arithmetic, device=self.stack.context.device)

    def ranges(self, models: int) -> list[slice]:
        """Ranges of rows such that those of ``models`` models, as float32, fit the workspace."""
        step = self.stack.context.workspace // (4 * max(self.width, 1) * (models + 1))
        step = max(64, step // 64 * 64)
        return [slice(r, min(r + step, self.out)) for r in range(0, self.out, step)]

    def rows(self, model: int, where: slice) -> torch.Tensor:
        """Rows of one model, [rows, width], rounded to the compute dtype; a strided view if the matrix is flipped."""
        stack = self.stack
        if not self._flipped and not self._fits:
            start = self._offset + where.start * self.width
            flat = stack.load(model, start, start + (where.stop - where.start) * self.width)
            return flat.view(-1, self.width)
        if model not in self._whole:  # flipped: its rows are columns of what is stored, so it is held whole
            self._whole[model] = stack.load(model, self._offset, self._offset + self.out * self.width)
        if self._flipped:
            return self._whole[model].view(self.width, self.out).t()[where]
        return self._whole[model].view(self.out, self.width)[where]

    def stream(
        self, *experts: int, base: int | None = None
    ) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
        """All rows of the base and of these experts (inputs of the group), the next ones read while these are used.

        ``base``: an expert in the place of the base.
        """
        base = self.stack.group.base if base is None else base
        assert base is not None
        ranges = self.ranges(1 + len(experts))

        def read(where: slice) -> list[torch.Tensor]:
            return [self.rows(m, where) for m in (base, *experts)]

        if self._flipped:
            if not self._fits:
                for model in self._whole.keys() - {base, *experts, self.stack.group.base}:
                    del self._whole[model]
            for where in ranges:
                found = read(where)
                yield where, found[0], found[1:]
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(read, ranges[0]) if ranges else None
            for i, where in enumerate(ranges):
                assert coming is not None
                found = coming.result()
                coming = ahead.submit(read, ranges[i + 1]) if i + 1 < len(ranges) else None
                yield where, found[0], found[1:]

    def delta(self, expert: int) -> torch.Tensor:
        """The whole task vector of one expert, [out, width], in the arithmetic type."""
        found = self.zeros(self.out, self.width)
        for where, base, (tensor,) in self.stream(expert):
            found[where] = tensor.to(found.dtype) - base.to(found.dtype)
        return found

    def put(self, where: slice, values: torch.Tensor) -> None:
        """Rows of the output, [rows, width]."""
        values = values.to(self.stack.out_dtype)
        if not self._flipped:
            self.stack.store(self._offset + where.start * self.width, values.reshape(-1))
            return
        if self._result is None:
            self._result = values.new_empty(self.width, self.out)
        self._result[:, where] = values.t()

    def add(self, delta: torch.Tensor, scale: float) -> None:
        """The output: the base plus ``scale * delta``, [out, width] in the arithmetic type, rounded once."""
        for where, base, _ in self.stream():
            self.put(where, base.to(delta.dtype) + scale * delta[where])

    def close(self) -> None:
        """Hand on what was put."""
        self._whole.clear()
        if self._result is not None:
            self.stack.store(self._offset, self._result.view(-1))
            self._result = None


@dataclass
class Stack:
    """One tensor of the base and of all experts.

    Attributes:
        group: name, inputs, base and dtypes.
        role: what the tensor is to the residual stream.
        load_stored: gives stored elements.
        store: takes the output's elements.
        context: backend, device, bases, report.
    """

    group: Group
    role: TensorRole
    load_stored: Load
    store_rounded: Store
    context: Context = field(default_factory=Context)

    @property
    def arithmetic(self) -> torch.dtype:
        """The type that sums are held in: float64 for float64, else float32."""
        return dtypes.arithmetic(self.group.compute_dtype).to_torch()

    @property
    def out_dtype(self) -> torch.dtype:
        """Dtype of the output."""
        return self.group.out_dtype.to_torch()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor as stored."""
        return self.group.inputs[0].shape

    @property
    def is_matrix(self) -> bool:
        """True if the tensor is made of 2-D problems."""
        return len(self.shape) - self.role.batch >= 2 and self.role.role not in (Role.NORM, Role.BIAS)

    def load(self, model: int, start: int, stop: int) -> torch.Tensor:
        """Elements of one model on the device, rounded to the compute dtype (16-bit ones are kept for float32)."""
        compute = self.group.compute_dtype
        stored = self.load_stored(model, start, stop).to(self.context.device)
        exact = compute == dtypes.float32 and stored.dtype.itemsize == 2
        return stored if exact else stored.to(compute.to_torch())

    def store(self, start: int, values: torch.Tensor) -> None:
        """Elements of the output, in its dtype."""
        self.store_rounded(start, values)

    def matrices(self, *, left: bool = False) -> Iterator[Matrix]:
        """The 2-D problems, in order. ``left``: transposed, so that what is done to inputs is done to outputs.

        A stack of matrices (``role.batch`` leading axes) is one problem each; otherwise axes after the first are
        flattened to inputs.
        """
        shape, batch = self.shape, self.role.batch
        rows, columns = shape[batch], prod(shape[batch + 1 :])
        side = "out" if left else "in"
        for i in range(prod(shape[:batch])):
            matrix = Matrix(
                self, i * rows * columns, (rows, columns), self.role.transposed != left, self.role.latent_axis == side
            )
            yield matrix
            matrix.close()

    def runs(self) -> Iterator[tuple[int, torch.Tensor, list[torch.Tensor]]]:
        """All elements as flat runs, in the arithmetic type: where they start, the base, the experts."""
        assert self.group.base is not None
        for start in range(0, self.group.numel, RUN):
            stop = min(start + RUN, self.group.numel)
            base = self.load(self.group.base, start, stop).to(self.arithmetic)
            yield start, base, [self.load(m, start, stop).to(self.arithmetic) for m in self.group.experts]

    def mean(self, weight: Sequence[float], scale: float) -> None:
        """The rule of tensors that are no matrices: base + scale * weighted mean of the task vectors."""
        total = sum(weight)
        for start, base, experts in self.runs():
            delta = sum((w * (t - base) for w, t in zip(weight, experts)), start=0 * base)
            if total != 0:
                base = base + (scale / total) * delta
            self.store(start, base.to(self.out_dtype))


def in_memory(
    group: Group, role: TensorRole, tensors: Sequence[torch.Tensor], out: torch.Tensor, context: Context
) -> Stack:
    """A stack over tensors in memory; ``out`` is contiguous."""
    flat = [t.detach().reshape(-1) for t in tensors]
    target = out.view(-1)

    def load(model: int, start: int, stop: int) -> torch.Tensor:
        return flat[model][start:stop]

    def store(start: int, values: torch.Tensor) -> None:
        target[start : start + values.numel()] = values

    return Stack(group, role, load, store, context)


MatrixMerge = Callable[..., None]
Arguments = Mapping[str, Any]
