"""What the ops of SCE share: the variance of each element over the task vectors, and the selection by it.

With ``d_i`` the n task vectors of an element in the compute dtype, as float64 numbers, ``e_i = d_i - d_0`` and
``e_0 = 0``: the variance is ``(n sum_i e_i^2 - (sum_i e_i)^2) / n^2``, rounded to the compute dtype once. Of equal task
vectors it is exactly 0. Its key is that of a magnitude, see :mod:`seme.ops._task_vectors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme.dtypes import DType
from seme.errors import OpError
from seme.ops._task_vectors import UNLIMITED, above, check_integers, deltas

if TYPE_CHECKING:
    import torch


def check_selection(op: str, thresholds: Sequence[int], tie_quotas: Sequence[int]) -> tuple[list[int], list[int]]:
    """One threshold and one quota, for all task vectors. A threshold of 0 has no ties to choose among: 0 is kept or
    not."""
    for name, values in (("thresholds", thresholds), ("tie_quotas", tie_quotas)):
        if len(values) != 1:
            raise OpError(f"{op}: {name} has {len(values)} entries, expected 1 for all tensors")
    found, quotas = check_integers(op, "thresholds", thresholds), check_integers(op, "tie_quotas", tie_quotas)
    if found[0] == 0 and 0 < quotas[0] < UNLIMITED:
        raise OpError(f"{op}: tie_quotas is {quotas}, expected 0 or at least 2^62 with the threshold 0")
    return found, quotas


def variance(found: Sequence[torch.Tensor]) -> torch.Tensor:
    """The population variance over tensors of one dtype, in that dtype."""
    import torch

    first, n = found[0].double(), len(found)
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for delta in found[1:]:
        deviation = delta.double() - first
        total = total + deviation
        squares = squares + deviation * deviation
    spread = (squares * n - total * total) / (n * n)
    dtype = found[0].dtype
    return spread if dtype == torch.float64 else spread.float().to(dtype)


def selected(
    tensors: Sequence[torch.Tensor], thresholds: Sequence[int], tie_quotas: Sequence[int], compute_dtype: DType
) -> list[torch.Tensor]:
    """The task vectors of all tensors but the first, flat, 0 where the position is not selected."""
    import torch

    found = deltas(tensors, compute_dtype)
    keep = above(variance(found), thresholds[0], tie_quotas[0])
    return [torch.where(keep, d, torch.zeros_like(d)) for d in found]
