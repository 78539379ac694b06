"""The CUDA C++ kernels: one function per op, named as the op, with the arguments of the Triton kernel's ``launch``.

They take tensors of the current CUDA device, and work on its current stream. Those of the element-wise ops are flat
and contiguous; of those of the matrix ops contiguous copies are made where they are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from seme import dtypes, native
from seme.dtypes import DType
from seme.ops._op import Params
from seme.ops._task_vectors import UNLIMITED, native_selection, ranked
from seme.ops._weights import here
from seme.ops.trimmed_l1 import reference as row_sums

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
    import torch

    function = getattr(native.module("_C_cuda"), kernel)
    values = [_raw(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    function([_raw(t) for t in tensors], *values, _raw(out), _stream())


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
    factors: Sequence[float],
    divisor: float,
    scale: float,
    compute_dtype: DType,
    **selection: Any,
) -> None:
    """Writes ``out``; ``csrc/cuda/task_vector_sum.cu``."""
    tensors, selection = ranked(tensors, selection, compute_dtype)
    chosen = _selection(tensors, selection, compute_dtype, native.module("_C_cuda").TILE)
    _call("task_vector_sum", tensors, out, weights, factors, *chosen, divisor, scale, compute_dtype.native)


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


def line_products(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    relative: bool,
    row: int,
    columns: int,
    compute_dtype: DType,
) -> None:
    """Writes ``out``, float64 [blocks, n, n] or [blocks, n, n, columns] seen as one axis;
    ``csrc/cuda/line_products.cu``."""
    _call("line_products", tensors, out, relative, row or native.BLOCK, columns, compute_dtype.native)


def line_sum(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    weights: Sequence[float],
    relative: bool,
    row: int,
    columns: int,
    offset: int,
    compute_dtype: DType,
) -> None:
    """Writes ``out``; ``csrc/cuda/line_sum.cu``."""
    plain, chosen, place = _weight_sets(weights, len(tensors) - relative, out, row, columns, offset)
    sets = _raw(chosen) if chosen is not None else None  # `chosen` holds the memory until the kernel is launched
    _call("line_sum", tensors, out, relative, plain, sets, place, compute_dtype.native)


def nearswap(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, *, t: float, least: float, compute_dtype: DType
) -> None:
    """Writes ``out``; ``csrc/cuda/nearswap.cu``."""
    _call("nearswap", tensors, out, t, least, compute_dtype.native)


def tie_counts(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, *, thresholds: Sequence[int], compute_dtype: DType
) -> None:
    """Adds to ``out``, int64 of every threshold; ``csrc/cuda/block_ties.cu``."""
    out += _block_ties(tensors, thresholds, compute_dtype, native.BLOCK).sum(1)


def ties(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    weights: Sequence[float],
    factors: Sequence[float],
    normalize: bool,
    scale: float,
    compute_dtype: DType,
    **selection: Any,
) -> None:
    """Writes ``out``; ``csrc/cuda/ties.cu``."""
    tensors, selection = ranked(tensors, selection, compute_dtype)
    chosen = _selection(tensors, selection, compute_dtype, native.module("_C_cuda").TILE)
    _call("ties", tensors, out, weights, factors, *chosen, normalize, scale, compute_dtype.native)


def trimmed_l1(tensors: Sequence[torch.Tensor], out: torch.Tensor, *, compute_dtype: DType, **selection: Any) -> None:
    """Writes ``out``, float64 [blocks, n, 2] seen as one axis; ``csrc/cuda/trimmed_l1.cu``.

    Sums of rows, [rows, n, 2], which have to be sorted before, are left to torch, in the same order.
    """
    if selection["row"]:
        out.copy_(row_sums(tensors, compute_dtype=compute_dtype, **selection).view(-1))
        return
    _call(
        "trimmed_l1", tensors, out, *_selection(tensors, selection, compute_dtype, native.BLOCK), compute_dtype.native
    )


def variance_histogram(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, *, lowest: int, shift: int, compute_dtype: DType
) -> None:
    """Adds to ``out``, int64 [1, 65538] seen as one axis; ``csrc/cuda/variance_histogram.cu``."""
    _call("variance_histogram", tensors, out, lowest, shift, compute_dtype.native)


def variance_ties(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, *, thresholds: Sequence[int], compute_dtype: DType
) -> None:
    """Adds to ``out``, int64 [1]; ``csrc/cuda/variance_ties.cu``."""
    out += _variance_block_ties(tensors, thresholds[0], compute_dtype, native.BLOCK).sum()


def selected_squares(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
) -> None:
    """Writes ``out``, float64 [blocks, n] seen as one axis; ``csrc/cuda/selected_squares.cu``."""
    ends = _variance_tie_ends(tensors, thresholds[0], tie_quotas[0], compute_dtype, native.BLOCK)
    selection = (thresholds, tie_quotas, None if ends is None else _raw(ends))
    _call("selected_squares", tensors, out, *selection, compute_dtype.native)


def sce(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    coefficients: Sequence[float],
    thresholds: Sequence[int],
    tie_quotas: Sequence[int],
    compute_dtype: DType,
) -> None:
    """Writes ``out``; ``csrc/cuda/sce.cu``."""
    tile = native.module("_C_cuda").TILE
    ends = _variance_tie_ends(tensors, thresholds[0], tie_quotas[0], compute_dtype, tile)
    selection = (thresholds, tie_quotas, None if ends is None else _raw(ends))
    _call("sce", tensors, out, coefficients, *selection, compute_dtype.native)


def ram(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    scales: Sequence[float],
    epsilon: float,
    rounded: bool,
    compute_dtype: DType,
) -> None:
    """Writes ``out``; ``csrc/cuda/ram.cu``."""
    _call("ram", tensors, out, scales, epsilon, rounded, compute_dtype.native)


def overlap_counts(tensors: Sequence[torch.Tensor], out: torch.Tensor, *, epsilon: float, compute_dtype: DType) -> None:
    """Adds to ``out``, int64 [n, 2] seen as one axis; ``csrc/cuda/ram.cu``."""
    _call("overlap_counts", tensors, out, epsilon, compute_dtype.native)


def row_divergence(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, *, row: int, rounded: bool, compute_dtype: DType
) -> None:
    """Writes ``out``, float64 [rows]; ``csrc/cuda/row_divergence.cu``."""
    _call("row_divergence", tensors, out, row, rounded, compute_dtype.native)


def importance_histogram(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    row: int,
    factors: Sequence[float],
    lowest: Sequence[int],
    shift: Sequence[int],
    offset: int,
    compute_dtype: DType,
) -> None:
    """Adds to ``out``, int64 [windows, 65538] seen as one axis; ``csrc/cuda/importance.cu``."""
    own = _factors(factors, row, offset, tensors[0])
    _call("importance_histogram", tensors, out, _raw(own), row, lowest, shift, compute_dtype.native)


def importance_fusion(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    *,
    row: int,
    factors: Sequence[float],
    threshold: float,
    offset: int,
    compute_dtype: DType,
) -> None:
    """Writes ``out``; ``csrc/cuda/importance.cu``."""
    own = _factors(factors, row, offset, tensors[0])
    _call("importance_fusion", tensors, out, _raw(own), row, threshold, compute_dtype.native)


def nonfinite(tensors: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Adds to ``out``, int64 [n]; ``csrc/cuda/nonfinite.cu``."""
    _call("nonfinite", tensors, out)


def elect_select(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bases: torch.Tensor,
    counts: torch.Tensor,
    energies: torch.Tensor,
    *,
    lowest: int,
    shift: int,
) -> None:
    """Adds to ``counts`` and ``energies``; ``csrc/cuda/elect.cu``, which adds energies up in fixed point.

    One unit is at most 2^-60 of what a sum can reach, ``||T_m||_F^2 ||S||_F^2``; NaN if that is not finite.
    """
    import torch

    every, shape = _contiguous(base, *tensors), (*base.shape, bases.shape[0])
    norms = torch.empty(len(tensors), base.shape[0], dtype=torch.float64, device=base.device)
    _matrix("squared_norms", every, shape, norms)
    reach = norms.sum(1) * torch.linalg.vector_norm(bases, dtype=torch.float64) ** 2
    unit = torch.where(reach > 0, torch.exp2(reach.log2().ceil() - 61), 1.0)
    unit = torch.where(reach.isfinite(), unit, torch.nan)
    added, fixed = torch.zeros_like(counts), counts.new_zeros(energies.shape)
    _matrix("elect_select", every, bases.contiguous(), shape, lowest, shift, 1 / unit, added, fixed)
    counts += added
    energies += fixed * unit[:, None]


def elect(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bases: torch.Tensor,
    dual: torch.Tensor,
    out: torch.Tensor,
    *,
    threshold: int,
    etas: Sequence[float],
    scale: float,
    workspace: int = 128 << 20,
) -> None:
    """Writes ``out``; ``csrc/cuda/elect.cu``. Combined coordinates of about ``workspace`` bytes are held at once."""
    import torch

    every, labels = _contiguous(base, *tensors), bases.shape[0]
    bases, dual = _contiguous(bases, dual)
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    dtypes_ = {t.dtype for t in every}
    stored = torch.bfloat16 if dtypes_ == {torch.bfloat16} else torch.float32
    if torch.float64 in dtypes_ | {bases.dtype, dual.dtype}:
        stored = torch.float64
    pitch = -(-labels // 8) * 8  # rows that begin at a multiple of 16 bytes
    lines = max(1, workspace // (64 * max(pitch, 1) * stored.itemsize)) * 64
    combined = torch.empty(min(lines, base.shape[0]), pitch, dtype=stored, device=out.device)
    for begin in range(0, base.shape[0], lines):
        part = [t[begin : begin + lines] for t in every]
        held, shape = combined[: part[0].shape[0]], (*part[0].shape, labels)
        _matrix("elect_combine", part, bases, shape, threshold, etas, held, pitch)
        _matrix("elect_recompose", part[0], held, pitch, dual, shape, scale, target[begin : begin + lines])
    if target is not out:
        out.copy_(target)


def resolve(
    vectors: torch.Tensor,
    bases: torch.Tensor,
    labels: torch.Tensor,
    coefficients: torch.Tensor,
    residual: torch.Tensor,
    *,
    k: int,
    dependent: float,
    ranges: int | None = None,
) -> None:
    """Writes ``labels``, ``coefficients`` and ``residual``; ``csrc/cuda/resolve.cu``."""
    import torch

    if vectors.shape[0] == 0:
        return
    vectors, bases = _contiguous(vectors, bases)
    shape = (*vectors.shape, bases.shape[0])
    found = nearest(vectors, bases, k, ranges)
    solved = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (coefficients, residual)]
    _matrix("resolve_erase", vectors, bases, shape, found, k, dependent, *solved)
    for out, value in zip((labels, coefficients, residual), (found, *solved)):
        out.copy_(value)


def nearest(vectors: torch.Tensor, bases: torch.Tensor, k: int, ranges: int | None = None) -> torch.Tensor:
    """The labels [N, k] of the nearest bases, int64, by falling ``|cosine|``; contiguous operands.

    The labels are cut into ``ranges`` parts that are searched at the same time, by default as many as fill the GPU.
    """
    import torch

    count, vocabulary = vectors.shape[0], bases.shape[0]
    if ranges is None:
        processors = torch.cuda.get_device_properties(vectors.device).multi_processor_count
        ranges = max(1, min(-(-vocabulary // 64), 2 * processors // -(-count // 64)))
    best = torch.empty(count, ranges, k, dtype=torch.int64, device=vectors.device)
    _matrix("resolve_select", vectors, bases, (*vectors.shape, vocabulary), k, ranges, best)
    return 0xFFFFFFFF - (best.view(count, -1).topk(k).values & 0xFFFFFFFF)


def _weight_sets(
    weights: Sequence[float], count: int, out: torch.Tensor, row: int, columns: int, offset: int
) -> tuple[list[float], torch.Tensor | None, tuple[int, int, int]]:
    """The weights of tensors, the table of those of rows or columns, and which they are, as the bindings take them."""
    import torch

    place = (row, columns, offset)
    if not row and not columns:
        return list(weights), None, place
    values = list(here(weights, count, out.numel(), row, offset))
    return [], torch.tensor(values, dtype=torch.float64, device=out.device), place


def _contiguous(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.contiguous() for t in tensors]


def _matrix(kernel: str, *arguments: Any) -> None:
    """``kernel(*arguments, stream)`` of the compiled module, tensors and lists of them as the module takes them."""
    import torch

    def raw(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _raw(value)
        is_list = isinstance(value, list) and value and isinstance(value[0], torch.Tensor)
        return [_raw(t) for t in value] if is_list else value

    getattr(native.module("_C_cuda"), kernel)(*map(raw, arguments), _stream())


def _block_ties(
    tensors: Sequence[torch.Tensor], thresholds: Sequence[int], compute_dtype: DType, block: int
) -> torch.Tensor:
    """int64 [thresholds, blocks]: how many keys of each block of ``block`` elements equal the threshold."""
    import torch

    blocks = -(-tensors[0].numel() // block)
    counts = torch.empty(len(thresholds), blocks, dtype=torch.int64, device=tensors[0].device)
    _call("block_ties", tensors, counts, thresholds, compute_dtype.native, block)
    return counts


def _selection(
    tensors: Sequence[torch.Tensor], selection: Params, compute_dtype: DType, block: int
) -> tuple[Any, torch.Tensor | None]:
    """A selection as the compiled module takes it, and the ties up to the end of each block.

    They are int64 [thresholds, blocks]; None if no quota binds and nobody has to know.
    """
    ends = None
    if any(0 < quota < UNLIMITED for quota in selection["tie_quotas"]):
        ends = _block_ties(tensors, selection["thresholds"], compute_dtype, block).cumsum(1)
    return native_selection(selection), ends


def _variance_block_ties(
    tensors: Sequence[torch.Tensor], threshold: int, compute_dtype: DType, block: int
) -> torch.Tensor:
    """int64 [blocks]: how many variances of each block of ``block`` elements have the threshold for a key."""
    import torch

    counts = torch.empty(-(-tensors[0].numel() // block), dtype=torch.int64, device=tensors[0].device)
    _call("variance_ties", tensors, counts, threshold, compute_dtype.native, block)
    return counts


def _variance_tie_ends(
    tensors: Sequence[torch.Tensor], threshold: int, quota: int, compute_dtype: DType, block: int
) -> torch.Tensor | None:
    """The ties up to the end of each block, as int64 [blocks]; None if the quota does not bind."""
    if not 0 < quota < UNLIMITED:
        return None
    return _variance_block_ties(tensors, threshold, compute_dtype, block).cumsum(0)


def _factors(factors: Sequence[float], row: int, offset: int, tensor: torch.Tensor) -> torch.Tensor:
    """The factors of the rows of a tensor that begins at ``offset``, on its device."""
    import torch

    own = factors[offset // row : (offset + tensor.numel()) // row]
    return torch.tensor(own, dtype=torch.float64, device=tensor.device)
