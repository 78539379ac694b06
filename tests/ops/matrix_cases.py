"""Calls of every matrix op, their float64 references, and the bound that results are held to.

The references are written as the method's formulas are, on float64 copies of the operands, and share no code with
the ops. A result passes if its error against the reference is at most twice that of plain torch in the working dtype,
plus a few units in the last place of the sum of the magnitudes that went into the element (the natural scale of a sum's
rounding error), plus one rounding to the result's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from seme import dtypes
from seme.ops._matrix import MatrixOp
from seme.ops._op import Spec
from seme.ops._registry import MATRIX_OPS

Tensor = torch.Tensor

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# dtypes of the base and the experts in turn, and of everything else (bases, projections, moments, weights)
DTYPES: dict[str, tuple[tuple[torch.dtype, ...], torch.dtype]] = {
    "bf16": ((BF16,), F32),
    "f16": ((F16,), F32),
    "f32": ((F32,), F32),
    "f64": ((F64,), F64),
    "mixed": ((BF16, F32, F16), F32),
    "mixed-f64": ((F32, F64, BF16), BF16),
}
# r, d, v: rows of the weights, their width, labels
SIZES = ((0, 7, 9), (1, 1, 1), (7, 63, 65), (65, 7, 129), (129, 65, 257), (63, 129, 64), (257, 33, 7))
EMPTY = ((5, 0, 3), (0, 0, 2), (3, 4, 0))  # v = 0 is no call of resolve: k is at least 1
VIEWS = ("rows", "columns", "offset", "steps", "mixed")
FLOOR = 4
"""Units in the last place of the working dtype that every error is allowed, relative to the scale of the element."""


@dataclass
class Case:
    """One call of an op: operands in its order, arguments, and the names of the results."""

    op: MatrixOp
    operands: list[Any]
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def acc(self) -> torch.dtype:
        """The working dtype."""
        wide = any(t.dtype == F64 for o in self.operands for t in (o if isinstance(o, list) else [o]))
        return F64 if wide else F32

    def plan(self, **arguments: Any) -> tuple[dict[str, Any], tuple[Spec, ...]]:
        """What the op's check makes of the call: parameters of the backends, and results."""

        def spec(t: Tensor) -> Spec:
            return Spec(tuple(t.shape), dtypes.from_torch(t.dtype))

        specs = [[spec(t) for t in o] if isinstance(o, list) else spec(o) for o in self.operands]
        return self.op.check(*specs, **{**self.arguments, **arguments})

    def outs(self, start: float | None = None) -> list[Tensor]:
        """Memory for the results: NaN (the greatest integer) everywhere, or what an accumulating op starts from."""
        found = []
        for spec in self.plan()[1]:
            dtype = spec.dtype.to_torch()
            poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
            value = (1 if start is None else start) if self.op.accumulates else poison
            found.append(torch.full(spec.shape, value, dtype=dtype))
        return found

    def run(self, backend: str, threads: int = 0, outs: list[Tensor] | None = None) -> list[Tensor]:
        """The results through ``torch.ops.seme``, into poisoned memory."""
        outs = self.outs(0) if outs is None else outs
        self.op(*self.operands, outs=outs, backend=backend, threads=threads, **self.arguments)
        return outs

    def plain(self) -> list[Tensor]:
        """The results of plain torch in the working dtype, before they are rounded to the result's."""
        params, _ = self.plan()
        found = self.op.reference(*self.operands, **params)
        return list(found) if isinstance(found, tuple) else [found]

    def truth(self) -> list[Truth]:
        """The float64 reference of every result."""
        wide = [[t.double() for t in o] if isinstance(o, list) else o.double() for o in self.operands]
        return list(TRUTHS[self.op.name](*wide, **self.arguments))


@dataclass
class Truth:
    """The float64 value of a result, the scale of its rounding errors, and what else may differ (see ``elect``)."""

    value: Tensor
    scale: Tensor
    slack: Tensor | float = 0.0


def generator(*seeds: int) -> torch.Generator:
    """Random numbers that depend on the sizes of a case alone."""
    seed = 0
    for value in seeds:
        seed = seed * 1009 + value + 1
    return torch.Generator().manual_seed(seed)


def seen(matrix: Tensor, view: str) -> Tensor:
    """The same values in memory of another layout, with NaN around them."""
    rows, cols = matrix.shape

    def around(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=matrix.dtype)

    if view == "columns":
        found = around(cols + 1, rows + 3).T[2 : rows + 2, 1 : cols + 1]
    elif view == "offset":
        found = around(rows + 2, cols + 5)[1 : rows + 1, 3 : cols + 3]
    elif view == "steps":
        found = around(rows, 2 * cols + 1)[:, 1::2]
    else:
        return matrix.clone()
    return found.copy_(matrix)


def orthonormal_rows(rows: int, width: int, gen: torch.Generator) -> Tensor:
    """Unit rows in float64."""
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=gen, dtype=F64), dim=1)


def make(
    name: str, dtype: str = "f32", size: tuple[int, int, int] = (129, 65, 257), experts: int = 3, view: str = "rows"
) -> Case:
    """A call of the op `name` on weights [r, d] and v labels, in the memory layout `view`."""
    r, d, v = size
    gen = generator(r, d, v, experts)
    stored, other = DTYPES[dtype]

    def weights(values: Tensor, i: int) -> Tensor:
        layout = VIEWS[i % 4] if view == "mixed" else view
        return seen(values.to(stored[i % len(stored)]), layout)

    def rest(values: Tensor) -> Tensor:
        return seen(values.to(other), view if view != "mixed" else "offset")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=F64)

    # Weights and deltas of the sizes that fine-tuning leaves: a delta is a few bfloat16 steps of the weight.
    base = 0.04 * normal(r, d)
    tensors = [weights(base + 0.004 * normal(r, d), i + 1) for i in range(experts)]
    base = weights(base, 0)
    op = MATRIX_OPS[name]
    if name == "delta_gram":
        return Case(op, [base, tensors[0]])
    if name == "delta_project":
        return Case(op, [base, tensors[0], rest(normal(d, d))])
    if name == "project_erase":
        return Case(op, [base, tensors, [rest(normal(d, d)) for _ in tensors]], {"scale": 0.7})
    bases = rest(orthonormal_rows(v, d, gen))
    if name == "semantic_energy":
        factor = normal(d, d)
        return Case(op, [bases, rest(factor @ factor.T)])
    if name == "weighted_gram":
        kept = torch.rand(v, generator=gen) < 0.4
        return Case(op, [bases, rest((normal(v, 1) * kept[:, None]).T)[0]])
    if name == "resolve":
        return Case(op, [weights(normal(r, d), 0), bases], {"k": min(v, 5)})
    if name == "elect_select":
        return Case(op, [base, tensors, bases], {"lowest": 0, "shift": 15})
    assert name == "elect", f"tests/ops/matrix_cases.py has no call of {name}"
    dual = rest(normal(v, d) / max(v, 1))
    case = Case(op, [base, tensors, bases, dual], {"threshold": 0, "etas": [0.5, 0.3, 0.2][:experts], "scale": 0.9})
    z = coordinates(base.double(), [t.double() for t in tensors], bases.double())
    variances = variance(z).flatten()
    if len(variances):
        case.arguments["threshold"] = int(variances.quantile(0.7).float().view(torch.int32))
    return case


def cases(name: str) -> list[tuple[str, tuple[int, int, int], str]]:
    """dtype, size and view of the cases that every backend goes through: each dtype, size and view with others'."""
    found = [(dtype, SIZES[4], "rows") for dtype in DTYPES]
    found += [(dtype, size, "rows") for size in SIZES for dtype in ("bf16", "f32") if size != SIZES[4]]
    found += [(dtype, SIZES[2], view) for view in VIEWS[1:] for dtype in ("bf16", "f64", "mixed")]
    return found + [("f32", size, "rows") for size in EMPTY if name != "resolve" or size[2] > 0]


def error(found: Tensor, truth: Truth) -> Tensor:
    """Errors in units of the scale of each element (where that is 0, in its own units)."""
    scale = torch.where(truth.scale > 0, truth.scale, 1.0)
    return ((found.double() - truth.value).abs() - truth.slack).clamp(min=0) / scale


def check_result(found: Tensor, truth: Truth, plain: Tensor, acc: torch.dtype, floor: float = FLOOR) -> None:
    """Fails if the error is beyond twice that of plain torch, ``floor`` ulps of the working dtype and a rounding."""
    assert found.shape == truth.value.shape
    if found.numel() == 0:
        return
    bound = 2 * error(plain, truth).max() + floor * torch.finfo(acc).eps
    stored = torch.finfo(found.dtype)
    rounding = 0.51 * stored.eps if stored.eps > torch.finfo(acc).eps else 0.0  # half an ulp of a value that is off
    stored_step = truth.value.abs().clamp(min=stored.smallest_normal) * rounding
    worst = error(found, Truth(truth.value, truth.scale, truth.slack + stored_step))
    assert not worst.isnan().any(), "elements that were not written"
    assert worst.max() <= bound, f"error {worst.max():.3g} at {int(worst.argmax())}, allowed {bound:.3g}"


def check(case: Case, found: list[Tensor], start: float = 0.0, floor: float = FLOOR) -> None:
    """Holds all results of a call to the bound; accumulating ops began with ``start`` in every element."""
    if case.op.name == "resolve":
        check_resolved(case, found, floor)
    elif case.op.name == "elect_select":
        check_selected(case, found, start)
    else:
        for result, truth, plain in zip(found, case.truth(), case.plain()):
            # The terms of a product may be added to `start` one by one, each with a rounding of that size.
            if start:
                terms = max(t.shape[0] for t in case.operands)
                truth.slack = truth.slack + 0.5 * terms * torch.finfo(case.acc).eps * abs(start)
            check_result(result - start, truth, plain, case.acc, floor)


# float64 references


def gram_truth(base: Tensor, tensor: Tensor) -> list[Truth]:
    delta = tensor - base
    return [Truth(torch.einsum("ri,rj->ij", delta, delta), delta.abs().T @ delta.abs())]


def project_truth(base: Tensor, tensor: Tensor, matrix: Tensor) -> list[Truth]:
    delta = tensor - base
    return [Truth(delta @ matrix, delta.abs() @ matrix.abs())]


def erase_truth(base: Tensor, tensors: list[Tensor], projections: list[Tensor], scale: float) -> list[Truth]:
    value, size = base.clone(), base.abs()
    for tensor, projection in zip(tensors, projections):
        value += scale * (tensor - base) @ projection
        size = size + abs(scale) * (tensor - base).abs() @ projection.abs()
    return [Truth(value, size)]


def energy_truth(bases: Tensor, moment: Tensor) -> list[Truth]:
    value = torch.einsum("vi,ij,vj->v", bases, moment, bases)
    return [Truth(value, torch.einsum("vi,ij,vj->v", bases.abs(), moment.abs(), bases.abs()))]


def weighted_truth(bases: Tensor, weights: Tensor) -> list[Truth]:
    value = torch.einsum("v,vi,vj->ij", weights, bases, bases)
    return [Truth(value, torch.einsum("v,vi,vj->ij", weights.abs(), bases.abs(), bases.abs()))]


def coordinates(base: Tensor, tensors: list[Tensor], bases: Tensor) -> Tensor:
    """z [n, r, v]."""
    return torch.stack([(t - base) @ bases.T for t in tensors])


def variance(z: Tensor) -> Tensor:
    return ((z - z.mean(0)) ** 2).mean(0)


def window(keys: Tensor, z: Tensor, lowest: int = 0, shift: int = 15) -> tuple[Tensor, Tensor]:
    """Counts and energies of ``elect_select`` for keys of any shape and z [n, *that shape]."""
    keys, z = keys.flatten().long(), z.flatten(1)
    inside = keys >= lowest
    bins = ((keys[inside] - lowest) >> shift).clamp(max=65536)
    mixed = (bins < 65536) & ((keys[inside] - lowest) % (1 << shift) != 0)
    counts = torch.cat([torch.bincount(bins, minlength=65537), mixed.sum()[None]])
    energies = [torch.bincount(bins, weights=x[inside] ** 2, minlength=65537) for x in z]
    return counts, torch.stack(energies)


def elect_truth(
    base: Tensor,
    tensors: list[Tensor],
    bases: Tensor,
    dual: Tensor,
    threshold: int,
    etas: list[float],
    scale: float,
) -> list[Truth]:
    """SCE on z. Where a decision hangs on less than the rounding of z, either outcome is right: that is the slack."""
    z = coordinates(base, tensors, bases)
    eta = torch.tensor(etas, dtype=F64)[:, None, None]
    total = z.sum(0)
    sign = torch.where(total >= 0, 1.0, -1.0)
    agree = (torch.sign(z) == sign) * eta
    share = agree.sum(0)
    combined = torch.where(share > 0, (agree * z).sum(0) / share.where(share > 0, 1.0), 0.0)
    cut = torch.tensor(threshold, dtype=torch.int32).view(F32).double()
    kept = combined * (variance(z) >= cut)
    deltas = torch.stack([(t - base).abs() for t in tensors])
    rounding = 1e-5 * (deltas @ bases.abs().T).amax(0) if deltas.numel() else torch.zeros_like(total)
    doubtful = (z.abs() < rounding).any(0) | (total.abs() < len(etas) * rounding)
    doubtful |= (variance(z) - cut).abs() < 4 * rounding * z.abs().amax(0)
    spread = 2 * doubtful * z.abs().amax(0)
    size = base.abs() + abs(scale) * (kept.abs() @ dual.abs())
    if deltas.numel():
        size = size + abs(scale) * (deltas @ bases.abs().T).amax(0) @ dual.abs()
    return [Truth(base + scale * (kept @ dual), size, abs(scale) * (spread @ dual.abs()))]


TRUTHS = {
    "delta_gram": gram_truth,
    "delta_project": project_truth,
    "project_erase": erase_truth,
    "semantic_energy": energy_truth,
    "weighted_gram": weighted_truth,
    "elect": elect_truth,
}


def check_selected(case: Case, found: list[Tensor], start: float = 0.0) -> None:
    """Counts and energies from any bin to the top lie between those of the smallest and the greatest variances that
    rounding z may lead to: an error of z is at most d/2 ulps of the sum of the magnitudes of its terms.
    """
    base, tensors, bases = case.operands
    deltas = [t.double() - base.double() for t in tensors]
    z = torch.stack([delta @ bases.double().T for delta in deltas])
    eps = torch.finfo(case.acc).eps
    doubt = 0.5 * max(2, base.shape[1]) * eps * torch.stack([d.abs() @ bases.double().abs().T for d in deltas]).amax(0)
    spread = variance(z).sqrt()
    counts, energies = found[0] - int(start), found[1] - start

    def from_the_top(values: Tensor) -> Tensor:
        return values[..., :65537].flip(-1).cumsum(-1)

    for sign in (-1, 1):
        edge = ((spread + sign * doubt).clamp(min=0) ** 2 * (1 + sign * 4 * eps)).float()
        for value, bound in zip((counts, energies), window(edge.view(torch.int32), z, **case.arguments)):
            excess = sign * (from_the_top(value).double() - from_the_top(bound).double())
            slack = 0 if value.dtype == torch.int64 else 65537 * eps + 4 * (z.abs() * doubt).sum()
            assert (excess <= slack).all(), f"{excess.max()} beyond the bound"
    assert counts[:65537].sum() == spread.numel() or case.arguments["lowest"] > 0
    assert 0 <= counts[65537] <= counts[:65536].sum()


def check_resolved(case: Case, found: list[Tensor], floor: float = FLOOR) -> None:
    """The labels are the nearest ones, and coefficients and residual the least squares on the labels *found*."""
    labels, coefficients, residual = found
    vectors, bases = (o.double() for o in case.operands)
    params, _ = case.plan()
    k, eps = params["k"], torch.finfo(case.acc).eps
    assert labels.shape == coefficients.shape == (len(vectors), k)
    if not len(vectors):
        return
    scores = (vectors @ bases.T).abs()
    # A dot product of d terms is off by no more than d/2 ulps of the product of the norms.
    doubt = 0.5 * max(2, bases.shape[1]) * eps * vectors.norm(dim=1) * bases.norm(dim=1).max()
    chosen = scores.gather(1, labels)
    assert (labels.sort(1).values.diff(dim=1) > 0).all(), "a label was chosen twice"
    assert (chosen[:, 1:] <= chosen[:, :-1] + 2 * doubt[:, None]).all(), "labels do not fall by |cosine|"
    best = scores.sort(1, descending=True).values[:, :k]
    assert (chosen >= best - 2 * doubt[:, None]).all(), "a nearer label was left out"
    # Least squares: the error of plain torch on the same labels is the yardstick, the condition is part of it.
    from seme.ops.resolve import erase

    atoms = bases[labels]
    plain_c, plain_rest = erase(vectors.to(case.acc), atoms.to(case.acc), params["dependent"])
    true_c = (torch.linalg.pinv(atoms.mT) @ vectors[:, :, None])[:, :, 0]
    true_rest = vectors - torch.einsum("nk,nkd->nd", true_c, atoms)
    size = vectors.norm(dim=1, keepdim=True)
    condition = torch.linalg.cond(atoms).clamp(max=1e6)[:, None] if bases.shape[1] else 1.0
    for value, true, plain in ((coefficients, true_c, plain_c), (residual, true_rest, plain_rest)):
        scale = (size * condition).expand_as(true)
        check_result(value, Truth(true, scale), plain, case.acc, floor)
