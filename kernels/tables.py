"""The per-tensor numbers of a call, where a kernel can read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def table(values: Sequence[float] | Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``values`` as a tensor on ``device``. To a GPU they go through pinned memory: the caller does not wait.

    Kernel arguments would not do: Triton passes a Python float as float32, and compiles anew for integers that
    are 1 or divisible by 16.
    """
    import torch

    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
