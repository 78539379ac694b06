"""What the ops on task vectors share: keys of magnitudes, selection with tie quotas, sums in lanes.

The magnitude key of a value is its bits without the sign, in the compute dtype: an integer that grows with the
magnitude (31 bits for float32, 15 for bfloat16 and float16, 63 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes
from seme.dtypes import DType
from seme.errors import OpError
from seme.native import BLOCK
from seme.ops._op import Spec, check_tensors

if TYPE_CHECKING:
    import torch

UNLIMITED = 2**62
"""Tie quotas from here on keep every tie."""
LANES = 64


def check_base(op: str, specs: Sequence[Spec], compute_dtype: DType | None, least: int = 1) -> DType:
    """A base and at least ``least`` other tensors; returns the compute dtype."""
    compute = check_tensors(op, specs, compute_dtype)
    if len(specs) - 1 < least:
        raise OpError(f"{op}: no tensors besides the base")
    return compute


def check_integers(op: str, name: str, values: Sequence[int]) -> list[int]:
    """Integers in [0, 2^63), as keys, quotas and shifts are."""
    for i, value in enumerate(values):
        if not 0 <= int(value) < 2**63:
            raise OpError(f"{op}: {name}[{i}] is {value}, expected 0 to 2^63 - 1")
    return [int(v) for v in values]


def deltas(tensors: Sequence[torch.Tensor], compute_dtype: DType) -> list[torch.Tensor]:
    """The task vectors of all tensors but the first, flat, in the compute dtype."""
    compute = compute_dtype.to_torch()
    base = tensors[0].to(compute).reshape(-1)
    return [t.to(compute).reshape(-1) - base for t in tensors[1:]]


def magnitude_keys(delta: torch.Tensor) -> torch.Tensor:
    """int64 keys of a tensor's magnitudes. NaN has one key, the greatest: that of the quiet NaN without payload."""
    import torch

    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[delta.element_size()]
    mask = 2 ** (8 * delta.element_size() - 1) - 1
    keys: torch.Tensor = delta.contiguous().view(bits).to(torch.int64) & mask
    nan = torch.tensor(float("nan"), dtype=delta.dtype).view(bits).item()
    return keys.clamp(max=nan & mask)


def kept(delta: torch.Tensor, threshold: int, quota: int) -> torch.Tensor:
    """True for keys above the threshold, and for the first ``quota`` that equal it."""
    keys = magnitude_keys(delta)
    tied = keys == threshold
    if quota >= UNLIMITED:
        return (keys > threshold) | tied
    return (keys > threshold) | (tied & (tied.cumsum(0) <= quota))


def lane_sums(values: torch.Tensor) -> torch.Tensor:
    """float64 sums of blocks of :data:`BLOCK` values, in 64 lanes combined by halving.

    Args:
        values: float64 [rows, n].

    Returns:
        float64 [blocks, rows].
    """
    import torch

    rows, n = values.shape
    blocks = -(-n // BLOCK)
    padded = torch.nn.functional.pad(values, (0, blocks * BLOCK - n)).view(rows, blocks, BLOCK // LANES, LANES)
    total = torch.zeros(rows, blocks, LANES, dtype=torch.float64, device=values.device)
    for step in range(BLOCK // LANES):
        total = total + padded[:, :, step]
    width = LANES
    while width > 1:
        width //= 2
        total = total[..., :width] + total[..., width : 2 * width]
    return total[..., 0].T.contiguous()


INT64 = dtypes.BY_NAME["int64"]
