"""Inner products of n tensors with each other, per block of 8192 elements, in float64.

What slerp needs (one dot product, two squared norms). Within a block lane j of 64 adds the products of elements
j, j + 64, ... in order; the lanes are combined by halving. Add the blocks with ``math.fsum``: the total then
depends on neither chunks nor threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.native import BLOCK, View
from seme.ops._op import Op, Params, Spec, check_tensors
from seme.ops._task_vectors import lane_sums

if TYPE_CHECKING:
    import torch


def check(specs: Sequence[Spec], *, compute_dtype: DType | None = None) -> Params:
    """Equal shapes."""
    return {"compute_dtype": check_tensors("inner_products", specs, compute_dtype)}


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """float64 [blocks, n, n]."""
    return Spec((-(-specs[0].numel // BLOCK), len(specs), len(specs)), dtypes.float64)


def reference(tensors: Sequence[torch.Tensor], *, compute_dtype: DType) -> torch.Tensor:
    """The sums in plain torch, in the same order."""
    import torch

    compute, n = compute_dtype.to_torch(), len(tensors)
    rows = [t.to(compute).double().reshape(-1) for t in tensors]
    products = torch.stack([rows[i] * rows[j] for i in range(n) for j in range(n)])
    return lane_sums(products).view(-1, n, n)


def run_native(tensors: Sequence[View], out: View, threads: int, *, compute_dtype: DType) -> None:
    """The C++ kernel, ``csrc/cpu/inner_products.cpp``."""
    views = [t.raw() for t in tensors]
    native.module().inner_products(views, compute_dtype.native, out.raw(), threads)


OP = Op(
    name="inner_products",
    arguments="ScalarType? compute_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    ordered=True,
)


def inner_products(
    tensors: Sequence[torch.Tensor],
    *,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Gram matrices of the flattened tensors, one per block of 8192 elements.

    Args:
        tensors: n tensors of one shape.
        compute_dtype: dtype the inputs are rounded to; default: float64 if an input is float64, else float32.
        out: float64 [blocks, n, n], written in place.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        float64 [blocks, n, n]; the sum over blocks (``math.fsum``) is the Gram matrix.

    Raises:
        OpError: shapes differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    return OP(tensors, out=out, backend=backend, threads=threads, compute_dtype=compute_dtype)
