"""A merge as a method writes it: passes over the inputs of one tensor.

A method is a generator. It yields a :class:`Pass` and is sent its :class:`Reduced` result; whoever drives it
decides how large the chunks are, on which device and how many at once. So a method reads like its formula and
streams by itself: no method ever sees more than scalars and small tables.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from seme.dtypes import DType
from seme.ops._op import Op, Params, Spec


@dataclass(frozen=True)
class Reduced:
    """Result of a reducing pass.

    Attributes:
        data: the values, row-major: int64 sums of an accumulating op, or float64 rows of all blocks in order.
        shape: its shape.
        numel: elements of each input that the pass has seen (fewer than the tensor has, when sampled).
    """

    data: array[Any]
    shape: tuple[int, ...]
    numel: int


@dataclass(frozen=True)
class Countdown:
    """Quotas that run down along the tensor: chunk after chunk, ``parameter[i]`` of the pass's op is lowered by what
    ``op`` (accumulating, one count per quota) found in all chunks before."""

    op: Op
    params: Params
    parameter: str


@dataclass(frozen=True)
class Pass:
    """One op over all chunks of some inputs, which may repeat: a reduction, or (``writes``) the output itself.

    ``params`` have passed the op's check. ``sample`` lets the driver read evenly spaced blocks only.
    """

    op: Op
    inputs: tuple[int, ...]
    params: Params
    result: Spec
    writes: bool = False
    sample: bool = False
    countdown: Countdown | None = None


Merge = Generator[Pass, Reduced, None]


@dataclass(frozen=True)
class Group:
    """The inputs of one tensor, as a method sees them.

    Attributes:
        name: name of the tensor in the output.
        inputs: shape and stored dtype of the tensor in each model.
        base: which input is the base model; None if the recipe has none.
        compute_dtype: inputs are rounded to it on load; see ``docs/numerics.md``.
        out_dtype: dtype of the output.
        seed: of methods that draw random numbers.
        compat: the recipe asks for mergekit's values where seme's differ by default.
    """

    name: str
    inputs: tuple[Spec, ...]
    base: int | None
    compute_dtype: DType
    out_dtype: DType
    seed: int = 0
    compat: bool = False
    experts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(i for i in range(len(self.inputs)) if i != self.base))

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.inputs[0].numel

    def _order(self, op: Op, inputs: Sequence[int] | None) -> tuple[int, ...]:
        if inputs is not None:
            return tuple(inputs)
        if op.has_base:
            assert self.base is not None
            return (self.base, *self.experts)
        return tuple(range(len(self.inputs)))

    def check(self, op: Op, inputs: Sequence[int] | None = None, **arguments: Any) -> Params:
        """The op's check on these inputs: its parameters for every chunk."""
        specs = [self.inputs[i] for i in self._order(op, inputs)]
        return op.check(specs, compute_dtype=self.compute_dtype, **arguments)

    def reduce(
        self,
        op: Op,
        inputs: Sequence[int] | None = None,
        *,
        sample: bool = False,
        countdown: Countdown | None = None,
        **arguments: Any,
    ) -> Pass:
        """A reducing pass of ``op``. ``inputs`` default to all; base first for ops on task vectors."""
        order = self._order(op, inputs)
        params = self.check(op, order, **arguments)
        return Pass(op, order, params, op.result([self.inputs[i] for i in order], params), False, sample, countdown)

    def write(
        self, op: Op, inputs: Sequence[int] | None = None, *, countdown: Countdown | None = None, **arguments: Any
    ) -> Pass:
        """The pass that writes the output; the last one of a method."""
        order = self._order(op, inputs)
        params = self.check(op, order, out_dtype=self.out_dtype, **arguments)
        result = op.result([self.inputs[i] for i in order], params)
        params.pop("out_dtype", None)
        return Pass(op, order, params, result, True, False, countdown)
