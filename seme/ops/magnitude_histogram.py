"""Histogram of magnitude keys of task vectors in a window of 65536 bins: how thresholds are found without a sort.

A key is the bits of a magnitude in the compute dtype without the sign; it grows with the magnitude. Bin
``(key - lowest) >> shift`` is counted for keys from ``lowest`` on; keys beyond the last bin are counted together;
keys below the window are not counted. The last column tells whether a bin may hold different keys.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from seme import native
from seme.dtypes import DType
from seme.errors import OpError
from seme.native import View
from seme.ops._op import Op, Params, Spec, check_per_tensor
from seme.ops._task_vectors import INT64, check_base, check_integers, deltas, magnitude_keys

if TYPE_CHECKING:
    import torch

BINS = 65536
COLUMNS = BINS + 2


def check(
    specs: Sequence[Spec], *, lowest: Sequence[int], shift: Sequence[int], compute_dtype: DType | None = None
) -> Params:
    """Equal shapes, one window per task vector."""
    compute = check_base("magnitude_histogram", specs, compute_dtype)
    check_per_tensor("magnitude_histogram", "lowest", lowest, len(specs) - 1)
    check_per_tensor("magnitude_histogram", "shift", shift, len(specs) - 1)
    if any(s > 47 for s in shift):
        raise OpError(f"magnitude_histogram: shift is {list(shift)}, at most 47 is needed for 63-bit keys")
    return {
        "lowest": check_integers("magnitude_histogram", "lowest", lowest),
        "shift": check_integers("magnitude_histogram", "shift", shift),
        "compute_dtype": compute,
    }


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """int64 [n, 65538]."""
    return Spec((len(specs) - 1, COLUMNS), INT64)


def reference(
    tensors: Sequence[torch.Tensor], *, lowest: Sequence[int], shift: Sequence[int], compute_dtype: DType
) -> torch.Tensor:
    """Counts in plain torch."""
    import torch

    windows = zip(deltas(tensors, compute_dtype), lowest, shift)
    return torch.stack([count_keys(delta, low, s) for delta, low, s in windows])


def count_keys(values: torch.Tensor, lowest: int, shift: int) -> torch.Tensor:
    """int64 [65538]: the magnitude keys of a tensor in a window, as the columns of this op's result."""
    return count_in_window(magnitude_keys(values), lowest, shift)


def count_in_window(keys: torch.Tensor, lowest: int, shift: int) -> torch.Tensor:
    """int64 [65538]: the same of int64 keys."""
    import torch

    above = keys[keys >= lowest] - lowest
    bins = above >> shift
    inside = above[bins < BINS]
    row = torch.bincount(bins.clamp(max=BINS), minlength=BINS + 1)
    mixed = ((inside & ((1 << shift) - 1)) != 0).sum()
    return torch.cat([row, mixed.reshape(1)])


def run_native(
    tensors: Sequence[View],
    out: View,
    threads: int,
    *,
    lowest: Sequence[int],
    shift: Sequence[int],
    compute_dtype: DType,
) -> None:
    """The C++ kernel, ``csrc/cpu/magnitude_histogram.cpp``; adds to ``out``."""
    views = [t.raw() for t in tensors]
    native.module().magnitude_histogram(views, lowest, shift, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="magnitude_histogram",
    arguments="int[] lowest, int[] shift, ScalarType? compute_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    has_base=True,
    accumulates=True,
)


def magnitude_histogram(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    lowest: Sequence[int],
    shift: Sequence[int],
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Count the magnitude keys of each task vector in a window of bins.

    Args:
        base: the base model's tensor.
        tensors: n tensors of its shape.
        lowest: n keys, the first of each window.
        shift: n numbers, log2 of the keys per bin.
        compute_dtype: default: float64 if an input is float64, else float32.
        out: int64 [n, 65538]; the counts are added to it.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        int64 [n, 65538]: the bins; keys beyond the window; keys inside it that are not the first of their bin
        (0: every bin holds one distinct key).

    Raises:
        OpError: shapes or counts differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"lowest": list(lowest), "shift": list(shift), "compute_dtype": compute_dtype}
    return OP([base, *tensors], out=out, backend=backend, threads=threads, **arguments)


def find(counts: array[Any], row: int, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest key of a window.

    Args:
        counts: int64 values of a histogram, row-major [n, 65538].
        row: which task vector.
        k: rank from the top of the window, from 1.

    Returns:
        The bin, and how many keys lie in bins above it; ``(-1, total)`` if the window holds fewer than ``k``.
    """
    begin = row * COLUMNS
    if native.why_not("_C") is None:
        address = counts.buffer_info()[0] + 8 * begin
        found: tuple[int, int] = native.module().find_in_histogram(address, BINS, k)
        return found
    above = 0
    for bin_ in range(BINS - 1, -1, -1):
        count = counts[begin + bin_]
        if above + count >= k:
            return bin_, above
        above += count
    return -1, above
