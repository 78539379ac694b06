"""The CUDA C++ kernels: one function per op, ``launch(flat_tensors, flat_out, **params)``, named as the op.

They take contiguous tensors of the current CUDA device, and work on its current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from seme import dtypes, native
from seme.dtypes import DType
from seme.ops._task_vectors import UNLIMITED

if TYPE_CHECKING:
    import torch


def _raw(tensor: torch.Tensor) -> tuple[int, int, int]:
    """A tensor as ``csrc/cuda/bindings.cpp`` takes it."""
    return tensor.data_ptr(), tensor.numel(), dtypes.from_torch(tensor.dtype).native


def _stream() -> tuple[int, int]:
    """The current CUDA device, and the address of its current stream."""
    import torch

    device = torch.cuda.current_device()
    return device, torch.cuda.current_stream(device).cuda_stream


def _call(kernel: str, tensors: Sequence[torch.Tensor], out: torch.Tensor, *arguments: Any) -> None:
    """``kernel(tensors, *arguments, out, stream)`` of the compiled module."""
    function = getattr(native.module("_C_cuda"), kernel)
    function([_raw(t) for t in tensors], *arguments, _raw(out), _stream())


def weighted_sum(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    weights: Sequence[float],
    divisor: float,
    compute_dtype: DType,
) -> None:
    """Writes ``out``; ``csrc/cuda/weighted_sum.cu``."""
    _call("weighted_sum", tensors, out, weights, divisor, compute_dtype.native)


def task_vector_sum(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    weights: Sequence[float],
    divisor: float,
    scale: float,
    compute_dtype: DType,
) -> None:
    """Writes ``out``; ``csrc/cuda/task_vector_sum.cu``."""
    _call("task_vector_sum", tensors, out, weights, divisor, scale, compute_dtype.native)


def inner_products(tensors: Sequence[torch.Tensor], out: torch.Tensor, *, compute_dtype: DType) -> None:
    """Writes ``out``, float64 [blocks, n, n] seen as one axis; ``csrc/cuda/inner_products.cu``."""
    _call("inner_products", tensors, out, compute_dtype.native)


def magnitude_histogram(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    lowest: Sequence[int],
    shift: Sequence[int],
    compute_dtype: DType,
) -> None:
    """Adds to ``out``, int64 [n, 65538] seen as one axis; ``csrc/cuda/magnitude_histogram.cu``."""
    _call("magnitude_histogram", tensors, out, lowest, shift, compute_dtype.native)


def tie_counts(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, *, thresholds: Sequence[int], compute_dtype: DType
) -> None:
    """Adds to ``out``, int64 [n]; ``csrc/cuda/block_ties.cu``."""
    out += _block_ties(tensors, thresholds, compute_dtype, native.BLOCK).sum(1)


def ties(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    weights: Sequence[float],
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    factors: Sequence[float],
    normalize: bool,
    scale: float,
    compute_dtype: DType,
) -> None:
    """Writes ``out``; ``csrc/cuda/ties.cu``."""
    ends = _tie_ends(tensors, thresholds, tie_quotas, compute_dtype, native.module("_C_cuda").TILE)
    selection = (weights, thresholds, tie_quotas, factors, None if ends is None else _raw(ends))
    _call("ties", tensors, out, *selection, normalize, scale, compute_dtype.native)


def trimmed_l1(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
) -> None:
    """Writes ``out``, float64 [blocks, n, 2] seen as one axis; ``csrc/cuda/trimmed_l1.cu``."""
    ends = _tie_ends(tensors, thresholds, tie_quotas, compute_dtype, native.BLOCK)
    selection = (thresholds, tie_quotas, None if ends is None else _raw(ends))
    _call("trimmed_l1", tensors, out, *selection, compute_dtype.native)


def nonfinite(tensors: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Adds to ``out``, int64 [n]; ``csrc/cuda/nonfinite.cu``."""
    _call("nonfinite", tensors, out)


def _block_ties(
    tensors: Sequence[torch.Tensor], thresholds: Sequence[int], compute_dtype: DType, block: int
) -> torch.Tensor:
    """int64 [n, blocks]: how many keys of each block of ``block`` elements equal the threshold of their tensor."""
    import torch

    blocks = -(-tensors[0].numel() // block)
    counts = torch.empty(len(thresholds), blocks, dtype=torch.int64, device=tensors[0].device)
    _call("block_ties", tensors, counts, thresholds, compute_dtype.native, block)
    return counts


def _tie_ends(
    tensors: Sequence[torch.Tensor],
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
    block: int,
) -> torch.Tensor | None:
    """The ties up to the end of each block, as int64 [n, blocks]; None if no quota binds and nobody has to know."""
    if not any(0 < quota < UNLIMITED for quota in tie_quotas):
        return None
    return _block_ties(tensors, thresholds, compute_dtype, block).cumsum(1)
