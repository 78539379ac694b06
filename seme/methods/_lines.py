"""Tensors as vectors: whole, or cut into rows or columns that are vectors of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from seme.methods._passes import Group, Pass, Reduced
from seme.native import BLOCK
from seme.ops.line_products import OP as LINE_PRODUCTS
from seme.ops.line_sum import OP as LINE_SUM
from seme.ops.task_vector_sum import OP as TASK_VECTOR_SUM
from seme.ops.weighted_sum import OP as WEIGHTED_SUM

SUMS = 1 << 22
"""Float64 numbers that the sums of columns may take in memory, 32 MiB."""


@dataclass(frozen=True)
class Lines:
    """How a tensor is cut: into rows of ``row`` elements, into ``columns`` columns, or (both 0) not at all.

    Attributes:
        unit: elements that a pass must have in memory together.
    """

    row: int = 0
    columns: int = 0
    unit: int = 1

    def products(self, group: Group, inputs: Sequence[int], relative: bool) -> Pass:
        """The pass that finds the inner products of the lines; see :meth:`grams`."""
        row = self.unit if self.columns else self.row
        return group.reduce(LINE_PRODUCTS, inputs, relative=relative, row=row, columns=self.columns)

    def grams(self, found: Reduced) -> list[Sequence[float]]:
        """Of every line the inner products of all pairs, a matrix row after row. ``math.fsum`` is exact, so a sum over
        blocks does not depend on how they were computed."""
        size = found.shape[1] * found.shape[2]
        if self.row:
            return [found.data[at : at + size] for at in range(0, len(found.data), size)]
        columns = self.columns or 1
        step = size * columns
        return [[math.fsum(found.data[i * columns + j :: step]) for i in range(size)] for j in range(columns)]

    def write(self, group: Group, inputs: Sequence[int], relative: bool, weights: Sequence[Sequence[float]]) -> Pass:
        """The pass that writes the sum of the inputs, of the task vectors and the base if ``relative``, where every
        line has weights of its own."""
        flat = [w for of_line in (zip(*weights) if self.columns else weights) for w in of_line]
        if not self.row and not self.columns:
            return group.write(TASK_VECTOR_SUM if relative else WEIGHTED_SUM, inputs, weights=flat)
        return group.write(LINE_SUM, inputs, weights=flat, relative=relative, row=self.row, columns=self.columns)


WHOLE = Lines()


def rows(shape: tuple[int, ...]) -> Lines:
    """The rows along the last dimension; a vector is one row."""
    numel = math.prod(shape)
    return WHOLE if not shape or shape[-1] == numel or numel == 0 else Lines(shape[-1], 0, shape[-1])


def columns(shape: tuple[int, ...], tensors: int) -> Lines:
    """What lies along the first dimension; a vector is one column.

    Blocks of as many rows are added up that the sums of all blocks fit into :data:`SUMS`.
    """
    numel = math.prod(shape)
    if not shape or shape[0] == numel or numel == 0:
        return WHOLE
    width = numel // shape[0]
    height = min(shape[0], max(-(-BLOCK // width), -(-numel * tensors**2 // SUMS)))
    return Lines(0, width, width * height)
