"""What kernels look up: the per-tensor numbers of a call, and per GPU how they are cut up.

Nothing is tuned while a merge runs. Every ``launch`` takes a ``shape`` that replaces the one of the table here, which
is how ``benchmarks/gpu/tune.py`` finds out what the table should say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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


def strides(matrices: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The strides from row to row, and from column to column, of each matrix."""
    return tuple(m.stride(0) for m in matrices), tuple(m.stride(1) for m in matrices)


class Flat(NamedTuple):
    """How an element-wise kernel is cut up: elements per program, and the warps of one."""

    elements: int
    warps: int

    def options(self) -> dict[str, Any]:
        """Launch options, as a kernel takes them."""
        return {"num_warps": self.warps, "enable_fp_fusion": False}

    def holding(self, elements: int) -> Flat:
        """As many elements per thread in a program of so many elements; 16 warps at most."""
        return Flat(elements, min(16, max(1, self.warps * elements // self.elements)))


# 8 elements per thread, so that a thread's part of a 16-bit tensor is one access of 16 bytes; the reductions take
# whole blocks of 8192 elements, of which a warp reads rows of 64 of 4 at the same time. Chosen on paper; not yet tuned
# on a GPU.
FLAT = {
    80: {
        "weighted_sum": Flat(1024, 4),
        "task_vector_sum": Flat(1024, 4),
        "ties": Flat(1024, 4),
        "tie_counts": Flat(1024, 4),
        "magnitude_histogram": Flat(1024, 4),
        "line_products": Flat(256, 1),  # columns, or 64 each of 4 rows
        "line_sum": Flat(1024, 4),
        "nearswap": Flat(1024, 4),
        "nonfinite": Flat(4096, 4),
        "inner_products": Flat(4 * 8192, 1),
        "trimmed_l1": Flat(4 * 8192, 1),
        "importance_fusion": Flat(1024, 4),
        "importance_histogram": Flat(1024, 4),
        "overlap_counts": Flat(1024, 4),
        "ram": Flat(1024, 4),
        "row_divergence": Flat(1024, 4),
        "sce": Flat(1024, 4),
        "variance_histogram": Flat(1024, 4),
        "variance_ties": Flat(1024, 4),
        "selected_squares": Flat(4 * 8192, 1),
    },
    90: {
        "weighted_sum": Flat(1024, 4),
        "task_vector_sum": Flat(1024, 4),
        "ties": Flat(1024, 4),
        "tie_counts": Flat(1024, 4),
        "magnitude_histogram": Flat(1024, 4),
        "line_products": Flat(256, 1),  # columns, or 64 each of 4 rows
        "line_sum": Flat(1024, 4),
        "nearswap": Flat(1024, 4),
        "nonfinite": Flat(4096, 4),
        "inner_products": Flat(4 * 8192, 1),
        "trimmed_l1": Flat(4 * 8192, 1),
        "importance_fusion": Flat(1024, 4),
        "importance_histogram": Flat(1024, 4),
        "overlap_counts": Flat(1024, 4),
        "ram": Flat(1024, 4),
        "row_divergence": Flat(1024, 4),
        "sce": Flat(1024, 4),
        "variance_histogram": Flat(1024, 4),
        "variance_ties": Flat(1024, 4),
        "selected_squares": Flat(4 * 8192, 1),
    },
}


def flat(op: str, device: torch.device) -> Flat:
    """How the kernel of an element-wise op is cut up on ``device``."""
    return FLAT[generation(device)][op]


class Tiles(NamedTuple):
    """How a matrix kernel is cut up: m x n results per program, k terms of the products per step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """Block sizes and launch options, as a kernel takes them."""
        return {
            "BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k,
            "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False,
        }  # fmt: skip


# By operand (see numeric.operand): what the accumulators leave of the registers, and of the shared memory of one
# multiprocessor, 163 KiB on sm_80 and 227 KiB on sm_90. Chosen on paper; not yet tuned on a GPU.
TILES = {
    80: {
        "bfloat16": Tiles(128, 128, 32, 8, 3),
        "tf32": Tiles(128, 128, 32, 8, 3),
        "float32": Tiles(64, 64, 32, 8, 2),
        "float64": Tiles(64, 64, 16, 8, 2),
    },
    90: {
        "bfloat16": Tiles(128, 128, 64, 8, 3),
        "tf32": Tiles(128, 128, 32, 8, 3),
        "float32": Tiles(64, 64, 32, 8, 2),
        "float64": Tiles(64, 64, 16, 8, 2),
    },
}


def generation(device: torch.device) -> int:
    """The key of the tables for ``device``: a GPU that has no row of its own takes that of the greatest lesser compute
    capability, the interpreter the last."""
    import torch

    if device.type != "cuda":
        return max(TILES)
    major, minor = torch.cuda.get_device_capability(device)
    return max((c for c in TILES if c <= 10 * major + minor), default=min(TILES))


def tiles(operand: str, device: torch.device, results: int = 1) -> Tiles:
    """The tiles for products of these operands on ``device``, if a program holds ``results`` tiles of sums at once."""
    return shrink(for_triton(TILES[generation(device)][operand.removesuffix("x3")], operand), results)


def for_triton(chosen: Tiles, operand: str) -> Tiles:
    """Smaller tiles where Triton has to hold all terms of a product."""
    from .numeric import DOT_TAKES_FLOAT64, FLOAT64_TERMS

    if operand != "float64" or DOT_TAKES_FLOAT64.value:
        return chosen
    return chosen._replace(m=32, n=32, k=FLOAT64_TERMS // 32**2)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where the interpreter runs."""
    import torch

    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def shrink(chosen: Tiles, results: int) -> Tiles:
    """The same number of sums per program for ``results`` tiles at once: the longer side is halved until they fit."""
    m, n = chosen.m, chosen.n
    while results * m * n > chosen.m * chosen.n and max(m, n) > 16:
        m, n = (m // 2, n) if m >= n else (m, n // 2)
    return chosen._replace(m=m, n=n)


def operand_of(models: Sequence[torch.Tensor], others: Sequence[torch.Tensor] = ()) -> str:
    """The operands of the matrix products of an op, as ``numeric.operand`` knows them.

    They follow the dtypes of the models (of what takes their place); `others` matter only if they are float64, and
    are rounded to the operand if need be. bfloat16 for bfloat16; with float16 among the models TF32, which has its 11
    significant bits: differences of fine-tuned float16 weights lie where float16 loses digits. float32 and float64
    are kept.
    """
    import torch

    dtypes = {t.dtype for t in models}
    if torch.float64 in dtypes | {t.dtype for t in others}:
        return "float64"
    if torch.float32 in dtypes:
        return "float32"
    return "tf32" if torch.float16 in dtypes else "bfloat16"


def precise(operand: str, precision: str) -> str:
    """The operand for a precision of float32 products, "ieee" or "tf32x3"; others are as they are."""
    return "tf32x3" if operand == "float32" and precision == "tf32x3" else operand
