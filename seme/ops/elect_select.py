"""First pass of rule ``elect``: how the variance over experts is distributed, and the energy at each variance.

``z_m = T_m S^T``, ``T_m = tensors[m] - base``, are the semantic coordinates of every row, one per label. The variance
of a position (row, label) is the mean over experts of ``(z_m - mean)^2``, with sums in the order of the experts; its
key is its bits in float32, an integer that grows with it (NaN has the greatest, ``0x7FC00000``). Keys are counted in a
window of 65536 bins as in :mod:`seme.ops.magnitude_histogram`, and ``z_m^2`` is added up per bin, so that a threshold
and the energies of what lies above it come from the same pass. Nothing of size [r, v] is stored.

Flops: ``2 n r v d``. Least bytes: base and tensors once, ``2 (n + 1) r d`` in bfloat16, and the bases once for each
block of rows, ``4 v d`` in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from seme import dtypes, native
from seme.errors import OpError
from seme.ops._matrix import (
    MatrixOp,
    Plan,
    acc_of,
    check_experts,
    check_matrix,
    raw,
    task_vectors,
    tiles,
    workspace,
)
from seme.ops._op import Spec
from seme.ops._task_vectors import INT64, magnitude_keys
from seme.ops.magnitude_histogram import BINS, COLUMNS

if TYPE_CHECKING:
    import torch

WHOLE = 15
"""The shift at which a window from key 0 on holds all keys."""
ROWS, LABELS = 1536, 1024
"""A tile of coordinates on the CPU: rows of all experts together, and labels."""


def check(base: Spec, tensors: Sequence[Spec], bases: Spec, *, lowest: int, shift: int) -> Plan:
    """Matrices of one shape, bases of their width, a window of keys."""
    check_experts("elect_select", base, tensors)
    check_matrix("elect_select", "bases", bases, (None, base.shape[1]), "for the columns of base")
    if not 0 <= lowest < 2**31:
        raise OpError(f"elect_select: lowest is {lowest}, expected a key, 0 to 2^31 - 1")
    if not 0 <= shift <= WHOLE:
        raise OpError(f"elect_select: shift is {shift}, expected 0 to {WHOLE}, which is enough for 31-bit keys")
    results = (Spec((COLUMNS,), INT64), Spec((len(tensors), BINS + 1), dtypes.float64))
    return {"lowest": int(lowest), "shift": int(shift)}, results


def coordinates(base: torch.Tensor, tensors: list[torch.Tensor], bases: torch.Tensor) -> list[torch.Tensor]:
    """``T_m S^T`` [r, v] of every expert, in the working dtype."""
    acc = acc_of(base, tensors, bases)
    origin, s = base.to(acc), bases.to(acc)
    return [(t.to(acc) - origin) @ s.T for t in tensors]


def variance_keys(z: list[torch.Tensor]) -> torch.Tensor:
    """int64 keys of the variance over the experts."""
    import torch

    mean = sum(z[1:], z[0]) / len(z)
    spread = [(x - mean) * (x - mean) for x in z]
    return magnitude_keys((sum(spread[1:], spread[0]) / len(z)).to(torch.float32))


def reference(
    base: torch.Tensor, tensors: list[torch.Tensor], bases: torch.Tensor, *, lowest: int, shift: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and energies in plain torch."""
    import torch

    z = coordinates(base, tensors, bases)
    keys = variance_keys(z).reshape(-1)
    inside = keys >= lowest
    above = keys[inside] - lowest
    bins = (above >> shift).clamp(max=BINS)
    mixed = (((above & ((1 << shift) - 1)) != 0) & (bins < BINS)).sum()
    counts = torch.cat([torch.bincount(bins, minlength=BINS + 1), mixed.reshape(1)])
    energies = torch.zeros(len(z), BINS + 1, dtype=torch.float64, device=base.device)
    for m, values in enumerate(z):
        energies[m].index_add_(0, bins, values.reshape(-1)[inside].double().square())
    return counts, energies


def run_cpu(
    base: torch.Tensor,
    tensors: list[torch.Tensor],
    bases: torch.Tensor,
    counts: torch.Tensor,
    energies: torch.Tensor,
    *,
    threads: int,
    lowest: int,
    shift: int,
) -> None:
    """Row blocks x label tiles: T_m in C++, products by torch, keys, counts and sums in C++."""
    import torch

    experts, module = len(tensors), native.module()
    tables = torch.zeros(threads, BINS + 2, 1 + experts, dtype=torch.float64)
    address = (tables.data_ptr(), tables.numel(), dtypes.float64.native)
    for _, deltas in delta_tiles(base, tensors, acc_of(base, tensors, bases), threads):
        for _, z in coordinate_tiles(deltas, bases):
            module.elect_select(raw(z), experts, lowest, shift, address, threads)
    total = tables.sum(0)
    counts.add_(total[:, 0].to(torch.int64))
    energies.add_(total[: BINS + 1, 1:].T)


def delta_tiles(
    base: torch.Tensor, tensors: list[torch.Tensor], acc: torch.dtype, threads: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows, and the task vectors there, [n rows, d]: those of one expert below another's."""
    experts, (count, width) = len(tensors), base.shape
    step = max(1, min(count, ROWS // experts))
    memory = workspace(experts * step, width, acc)
    for rows in tiles(count, step):
        yield rows, task_vectors(base[rows], [t[rows] for t in tensors], memory, threads)


def coordinate_tiles(deltas: torch.Tensor, bases: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Labels, and the semantic coordinates of the task vectors there, [n rows, labels]."""
    import torch

    memory = workspace(len(deltas), min(len(bases), LABELS), deltas.dtype)
    for labels in tiles(len(bases), LABELS):
        s = bases[labels].to(deltas.dtype)
        yield labels, torch.mm(deltas, s.T, out=memory[: len(deltas) * len(s)].view(len(deltas), len(s)))


OP = MatrixOp(
    name="elect_select",
    operands="Tensor base, Tensor[] tensors, Tensor bases",
    results=("counts", "energies"),
    arguments="int lowest, int shift",
    check=check,
    reference=reference,
    cpu=run_cpu,
    accumulates=True,
    cuda=True,
)


def elect_select(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bases: torch.Tensor,
    *,
    lowest: int = 0,
    shift: int = WHOLE,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the variances over experts of all semantic coordinates in a window, and add up their energies.

    Two calls find the exact threshold of a fraction: one over all keys, one with ``shift=0`` in the bin found
    (:func:`seme.ops.magnitude_histogram.find`).

    Args:
        base: the base model's latent vectors [r, d] as rows (or some of them), of any strides.
        tensors: n >= 1 matrices of the same shape; bfloat16, float16, float32, float64, mixed as you like.
        bases: [v, d], one unit basis a row.
        lowest: first key of the window.
        shift: log2 of the keys per bin, 0 to 15.
        out: the two results; counts and sums are added to them.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        ``counts``, int64 [65538]: the bins; keys beyond the window; keys inside it that are not the first of their
        bin. ``energies``, float64 [n, 65537]: per expert the sum of ``z_m^2`` over each bin, and beyond the window.

    Raises:
        OpError: shapes or counts differ, a dtype is not one of the four, or the window is none.
        BackendError: the backend does not work here.
    """
    operands = (base, list(tensors), bases)
    counts, energies = OP(*operands, outs=out, lowest=lowest, shift=shift, backend=backend, threads=threads)
    return counts, energies
