"""Second pass of rule ``elect``: SCE (select, calculate, erase) in semantic coordinates, recomposed and added.

``z_m = T_m S^T``, ``T_m = tensors[m] - base``. A position (row, label) is kept if the key of its variance over experts
(:mod:`seme.ops.elect_select`) is at least the threshold, by which a caller of the op may select; rule ``elect`` passes
0 and merges all positions. Its sign is that of ``sum_m z_m``, 0 counting as plus; the
experts that have this sign (0 has none) are averaged with weights eta:

    c = sum_m eta_m z_m agree_m / sum_m eta_m agree_m        (0 where nobody agrees, or nothing is kept)
    out = base + scale * C B

with the dual frame B of the bases. One pass over label tiles: project, erase, recompose, like attention without the
softmax; nothing of size [r, v] is stored.

Flops: ``2 (n + 1) r v d``. Least bytes: base and tensors once, ``2 (n + 1) r d`` in bfloat16, bases and dual once for
each block of rows, ``8 v d`` in float32, and ``out`` once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from seme import native
from seme.dtypes import DType
from seme.errors import OpError
from seme.ops._matrix import MatrixOp, Plan, acc_of, add_scaled, check_experts, check_matrix, like, raw, workspace
from seme.ops._op import Spec, check_per_tensor
from seme.ops.elect_select import coordinate_tiles, coordinates, delta_tiles, variance_keys

if TYPE_CHECKING:
    import torch


def check(
    base: Spec,
    tensors: Sequence[Spec],
    bases: Spec,
    dual: Spec,
    *,
    threshold: int,
    etas: Sequence[float],
    scale: float = 1.0,
    out_dtype: DType | None = None,
) -> Plan:
    """Matrices of one shape, bases and dual frame of their width, one eta for each tensor."""
    check_experts("elect", base, tensors)
    check_matrix("elect", "bases", bases, (None, base.shape[1]), "for the columns of base")
    check_matrix("elect", "dual", dual, bases.shape, "as bases has")
    check_per_tensor("elect", "etas", etas, len(tensors))
    if not 0 <= threshold < 2**31:
        raise OpError(f"elect: threshold is {threshold}, expected a key, 0 to 2^31 - 1")
    result = Spec(base.shape, out_dtype or base.dtype)
    check_matrix("elect", "out", result, base.shape)
    return {"threshold": int(threshold), "etas": [float(e) for e in etas], "scale": float(scale)}, (result,)


def reference(
    base: torch.Tensor,
    tensors: list[torch.Tensor],
    bases: torch.Tensor,
    dual: torch.Tensor,
    *,
    threshold: int,
    etas: Sequence[float],
    scale: float,
) -> torch.Tensor:
    """The formula; rounded when it is stored."""
    import torch

    acc = acc_of(base, tensors, bases, dual)
    z = [x.to(acc) for x in coordinates(base, tensors, bases)]
    sign = torch.where(sum(z[1:], z[0]) >= 0, 1.0, -1.0).to(acc)
    agrees = [(x * sign > 0).to(acc) for x in z]
    numerator = sum(eta * x * a for eta, x, a in zip(etas, z, agrees))
    denominator = sum(eta * a for eta, a in zip(etas, agrees))
    kept = (variance_keys(z) >= threshold) & (denominator != 0)
    combined = torch.where(kept, numerator / denominator, 0.0)
    return base.to(acc) + scale * (combined @ dual.to(acc))


def run_cpu(
    base: torch.Tensor,
    tensors: list[torch.Tensor],
    bases: torch.Tensor,
    dual: torch.Tensor,
    out: torch.Tensor,
    *,
    threads: int,
    threshold: int,
    etas: Sequence[float],
    scale: float,
) -> None:
    """Row blocks x label tiles: T_m and the election in C++, products by torch."""
    acc = acc_of(base, tensors, bases, dual)
    for rows, deltas in delta_tiles(base, tensors, acc, threads):
        total = like(out[rows], workspace(rows.stop - rows.start, base.shape[1], acc)).zero_()
        for labels, z in coordinate_tiles(deltas, bases):
            native.module().elect(raw(z), threshold, etas, threads)
            total.addmm_(z[: len(total)], dual[labels].to(acc))
        add_scaled(base[rows], total, scale, out[rows], threads)


OP = MatrixOp(
    name="elect",
    operands="Tensor base, Tensor[] tensors, Tensor bases, Tensor dual",
    results=("out",),
    arguments="int threshold, float[] etas, float scale=1.0, ScalarType? out_dtype=None",
    check=check,
    reference=reference,
    cpu=run_cpu,
    cuda=True,
)


def elect(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bases: torch.Tensor,
    dual: torch.Tensor,
    *,
    threshold: int,
    etas: Sequence[float],
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    threads: int = 0,
) -> torch.Tensor:
    """Merge latent vectors by election in semantic coordinates and add the result to the base.

    Args:
        base: the base model's latent vectors [r, d] as rows (or some of them), of any strides.
        tensors: n >= 1 matrices of the same shape; bfloat16, float16, float32, float64, mixed as you like.
        bases: [v, d], one unit basis a row.
        dual: [v, d], the dual frame, ``S (S^T S)^-1``.
        threshold: key of the smallest variance that is kept, from :func:`seme.ops.elect_select`; 0 keeps all.
        etas: n weights, the share of each expert's energy in what is kept.
        scale: factor of the merged task vector (lambda).
        out_dtype: dtype of a new output; default: that of the base.
        out: [r, d], overwritten, rounded to its dtype once; it must not share memory with an operand.
        backend: auto, torch, cpu, triton or cuda.
        threads: CPU threads; 0 takes ``torch.get_num_threads()``.

    Returns:
        [r, d]: ``out``, or a new tensor.

    Raises:
        OpError: shapes or counts differ, or a dtype is not one of the four.
        BackendError: the backend does not work here.
    """
    arguments: dict[str, Any] = {"threshold": threshold, "etas": list(etas), "scale": scale}
    if out is None:
        arguments["out_dtype"] = out_dtype
    outs = None if out is None else [out]
    operands = (base, list(tensors), bases, dual)
    result: torch.Tensor = OP(*operands, outs=outs, backend=backend, threads=threads, **arguments)
    return result
