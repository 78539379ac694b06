"""Inner products of n tensors, or of their rows or columns, with each other, per block of elements, in float64.

What the methods need that work with angles and norms. Within a block lane j of 64 adds the products of elements
j, j + 64, ... in order; the lanes are combined by halving. A block has 8192 elements; add the blocks with
``math.fsum``: the total then depends on neither chunks nor threads. With ``row`` a block is a row of that many
elements. With ``columns`` besides, a block is some rows of ``columns`` elements and the products are added separately
for each column, row after row.

``relative`` takes the products of the differences from the first tensor, rounded to the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.dtypes import DType
from seme.errors import OpError
from seme.native import BLOCK, View
from seme.ops._op import Op, Params, Spec, check_tensors
from seme.ops._task_vectors import deltas, lane_sums

if TYPE_CHECKING:
    import torch


def check(
    specs: Sequence[Spec],
    *,
    relative: bool = False,
    row: int = 0,
    columns: int = 0,
    compute_dtype: DType | None = None,
) -> Params:
    """Equal shapes; whole rows; a tensor that is compared with the first."""
    compute = check_tensors("line_products", specs, compute_dtype)
    if relative and len(specs) < 2:
        raise OpError("line_products: no tensors besides the first, which relative ones are compared with")
    numel = specs[0].numel
    whole = row >= 0 and columns >= 0 and (row % columns == 0 if columns else True)
    if not whole or numel % (columns or row or 1) or (columns and not row):
        raise OpError(f"line_products: {numel} elements are not whole rows with row {row}, columns {columns}")
    return {"relative": relative, "row": row, "columns": columns, "compute_dtype": compute}


def result(specs: Sequence[Spec], params: Params) -> Spec:
    """float64 [blocks, n, n], with ``columns`` [blocks, n, n, columns]."""
    n = len(specs) - params["relative"]
    columns = (params["columns"],) if params["columns"] else ()
    return Spec((-(-specs[0].numel // (params["row"] or BLOCK)), n, n, *columns), dtypes.float64)


def reference(
    tensors: Sequence[torch.Tensor], *, relative: bool, row: int, columns: int, compute_dtype: DType
) -> torch.Tensor:
    """The sums in plain torch, in the same order."""
    import torch

    compute = compute_dtype.to_torch()
    vectors = deltas(tensors, compute_dtype) if relative else [t.to(compute).reshape(-1) for t in tensors]
    rows, n = [v.double() for v in vectors], len(vectors)
    products = torch.stack([rows[i] * rows[j] for i in range(n) for j in range(n)])
    if not columns:
        return lane_sums(products, row or BLOCK).view(-1, n, n)
    blocks = []
    for part in products.split(row, 1):
        total = torch.zeros(n * n, columns, dtype=torch.float64, device=products.device)
        for line in part.view(n * n, -1, columns).unbind(1):
            total = total + line
        blocks.append(total.view(n, n, columns))
    return torch.stack(blocks) if products.numel() else products.new_zeros(0, n, n, columns)


def run_native(
    tensors: Sequence[View],
    out: View,
    threads: int,
    *,
    relative: bool,
    row: int,
    columns: int,
    compute_dtype: DType,
) -> None:
    """The C++ kernel, ``csrc/cpu/line_products.cpp``."""
    views = [t.raw() for t in tensors]
    code = compute_dtype.native
    native.module().line_products(views, relative, row or BLOCK, columns, code, out.raw(), threads)


OP = Op(
    name="line_products",
    arguments="bool relative=False, int row=0, int columns=0, ScalarType? compute_dtype=None",
    check=check,
    result=result,
    reference=reference,
    native=run_native,
    ordered=True,
)


def line_products(
    tensors: Sequence[torch.Tensor],
    *,
    relative: bool = False,
    row: int = 0,
    columns: int = 0,
    compute_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Gram matrices of the flattened tensors, one per block of elements.

    Args:
        tensors: tensors of one shape.
        relative: of the differences of the others from the first, so n is one less than tensors are given.
        row: elements per block; 0: 8192.
        columns: elements of a row of a matrix, of which ``row`` is a multiple: each column for itself.
        compute_dtype: dtype the inputs are rounded to; default: float64 if an input is float64, else float32.
        out: float64 [blocks, n, n], written in place; with ``columns`` [blocks, n, n, columns].
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        float64 [blocks, n, n]; the sum over blocks (``math.fsum``) is the Gram matrix. With ``columns``
        [blocks, n, n, columns].

    Raises:
        OpError: shapes differ, rows are not whole, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments = {"relative": relative, "row": row, "columns": columns, "compute_dtype": compute_dtype}
    return OP(tensors, out=out, backend=backend, threads=threads, **arguments)
