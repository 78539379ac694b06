"""What the ops of Arcee Fusion share: a base and one other tensor in rows, and the importance of an element.

The importance is ``s = R(|d| f)`` with ``d = R(x - b)`` and f the factor of the row, rounded by R. Its key is an
integer that grows with it: the key of a magnitude (:mod:`seme.ops._task_vectors`), where factors are not negative; in
bfloat16 and float16, where they may be, ``2^15 + key`` for s >= 0 and ``2^15 - key`` for s < 0.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme.dtypes import DType, float64
from seme.errors import OpError
from seme.native import View
from seme.ops._op import Spec, check_tensors
from seme.ops._task_vectors import deltas, magnitude_keys

if TYPE_CHECKING:
    import torch

SIGN = 0x8000


def check_rows(op: str, specs: Sequence[Spec], row: int, compute_dtype: DType | None) -> DType:
    """A base and one other tensor, whole rows; returns the compute dtype."""
    compute = check_tensors(op, specs, compute_dtype)
    if len(specs) != 2:
        raise OpError(f"{op}: {len(specs)} tensors, expected the base and one other")
    if row < 1 or specs[0].numel % row != 0:
        raise OpError(f"{op}: row is {row}, which {specs[0].numel} elements are no multiple of")
    return compute


def check_factors(op: str, specs: Sequence[Spec], row: int, factors: Sequence[float]) -> array[float]:
    """One factor per row of the whole tensor."""
    if len(factors) != specs[0].numel // row:
        raise OpError(f"{op}: factors has {len(factors)} entries for {specs[0].numel // row} rows")
    return factors if isinstance(factors, array) and factors.typecode == "d" else array("d", factors)


def factors_from(factors: array[float], row: int, offset: int, numel: int) -> tuple[int, int, int]:
    """The factors of elements [offset, offset + numel) as the compiled module takes them."""
    return View(factors.buffer_info()[0] + 8 * (offset // row), numel // row, float64).raw()


def importance(
    tensors: Sequence[torch.Tensor], factors: Sequence[float], row: int, offset: int, compute_dtype: DType
) -> torch.Tensor:
    """s of every element, flat, in the compute dtype."""
    import torch

    (delta,) = deltas(tensors, compute_dtype)
    begin = offset // row
    own = torch.tensor(factors[begin : begin + delta.numel() // row], dtype=torch.float64)
    if delta.dtype != torch.float64:
        own = own.float().to(delta.dtype)
    return delta.abs() * own.to(delta.device).repeat_interleave(row)


def importance_keys(score: torch.Tensor) -> torch.Tensor:
    """int64 keys of importances."""
    import torch

    keys = magnitude_keys(score)
    if score.element_size() > 2:
        return keys
    return torch.where(score < 0, SIGN - keys, SIGN + keys)
