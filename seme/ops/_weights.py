"""Weights of tensors: one set for all elements, or one for each row or column of a matrix.

A call says which with ``row`` (elements of a row; ``weights`` are [rows, n], row after row), ``columns`` (elements of a
row; ``weights`` are [n, columns], tensor after tensor) or neither (``weights`` are [n]). Weights are those of the whole
tensor; what is given of it begins at element ``offset``, with ``row`` at the beginning of a row.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes
from seme.dtypes import DType
from seme.errors import OpError
from seme.ops._op import Params

if TYPE_CHECKING:
    import torch

ARGUMENTS = "int row=0, int columns=0, int offset=0"
"""In the schema language."""


def check(
    op: str,
    weights: Sequence[float],
    count: int,
    numel: int,
    held: DType,
    *,
    row: int,
    columns: int,
    offset: int,
) -> Params:
    """One weight per tensor and set, rounded to ``held``; whole rows."""
    if row < 0 or columns < 0 or offset < 0 or (row and columns):
        raise OpError(f"{op}: row {row}, columns {columns}, offset {offset}; one of row and columns may be positive")
    if row and numel % row:
        raise OpError(f"{op}: {numel} elements are not whole rows of {row}")
    sets = numel // row if row else columns or 1
    if len(weights) != count * sets:
        raise OpError(f"{op}: weights has {len(weights)} entries for {count} tensors and {sets} rows or columns")
    if row or columns:
        rounded: Sequence[float] = array("d", weights if held == dtypes.float64 else array("f", weights))
        if held.itemsize == 2:
            rounded = array("d", [dtypes.round_to(held, w) for w in weights])
    else:
        rounded = [dtypes.round_to(held, w) for w in weights]
    return {"weights": rounded, "row": row, "columns": columns, "offset": offset}


def here(weights: Sequence[float], count: int, numel: int, row: int, offset: int) -> Sequence[float]:
    """Of the weights of all rows those of the ``numel`` elements from ``offset`` on."""
    return weights[offset // row * count : (offset + numel) // row * count] if row else weights


def per_element(
    weights: Sequence[float], i: int, count: int, like: torch.Tensor, row: int, columns: int, offset: int
) -> torch.Tensor | float:
    """The weights of tensor i for the flat elements of ``like``, float64; a number if they are all the same."""
    import torch

    if not row and not columns:
        return weights[i]
    table = torch.tensor(here(weights, count, like.numel(), row, offset), dtype=torch.float64, device=like.device)
    if row:
        return table.view(-1, count)[:, i].repeat_interleave(row)
    places = (offset + torch.arange(like.numel(), device=like.device)) % columns
    return table.view(count, columns)[i][places]
