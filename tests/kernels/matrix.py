"""What the tests of the matrix kernels share: calls of a launcher, and the truth for operands of 8 or 11 bits.

A kernel that rounds its operands for the tensor cores is held to two bounds: that of plain torch in the models' dtype
on the operands as they are, and the tight one of float32 on the operands as rounded. The second shows a fault that
would hide in the rounding of the first.
"""

from __future__ import annotations

import torch

from tests.ops import matrix_cases
from tests.ops.matrix_cases import BF16, F16, F32, Case, Tensor, error, make

DIGITS = {BF16: 8, F16: 11}
"""Significant bits of the operands of models stored so (float16 becomes TF32)."""


def launch(kernel, case: Case, outs: list[Tensor] | None = None, **options) -> list[Tensor]:
    """The results of a launcher, in memory that is poisoned (or zero, where it adds)."""
    params, _ = case.plan()
    outs = case.outs(0) if outs is None else outs
    kernel(*case.operands, *outs, **params, **options)
    return outs


def rounded(x: Tensor, digits: int) -> Tensor:
    """float32 with that many significant bits, to nearest even."""
    u = x.float().contiguous().view(torch.int32)
    drop = 24 - digits
    half = (1 << (drop - 1)) - 1
    return ((u + half + ((u >> drop) & 1)) & -(1 << drop)).view(F32)


def as_taken(case: Case) -> Case:
    """The call in float32 whose products are those that the tensor cores form, exactly."""
    name, operands = case.op.name, case.operands
    digits = DIGITS[operands[0].dtype]

    def expert(tensor: Tensor) -> Tensor:
        base = operands[0].float()
        delta = rounded(tensor.float() - base, digits)
        moved = base + delta
        assert torch.equal(moved - base, delta), "not exact in float32: take other numbers"
        return moved

    if name == "delta_gram":
        taken = [operands[0].float(), expert(operands[1])]
    elif name == "delta_project":
        matrix = operands[2]
        if digits == DIGITS[BF16]:  # in two parts
            high = rounded(matrix, digits)
            matrix = high + rounded(matrix - high, digits)
        else:
            matrix = rounded(matrix, digits)
        taken = [operands[0].float(), expert(operands[1]), matrix]
    else:
        others = [[rounded(t, digits) for t in o] if isinstance(o, list) else rounded(o, digits) for o in operands[2:]]
        taken = [operands[0].float(), [expert(t) for t in operands[1]], *others]
    return Case(case.op, taken, case.arguments)


def as_torch(case: Case) -> list[Tensor]:
    """The call in plain torch in the models' dtype."""
    dtype = case.operands[0].dtype
    base, tensors, *rest = ([t.to(dtype) for t in o] if isinstance(o, list) else o.to(dtype) for o in case.operands)
    if case.op.name == "delta_gram":
        delta = tensors - base
        return [delta.T @ delta]
    if case.op.name == "delta_project":
        return [(tensors - base) @ rest[0]]
    assert case.op.name == "project_erase"
    shares = [(t - base) @ p for t, p in zip(tensors, rest[0])]
    return [base + sum(shares[1:], shares[0]) * case.arguments["scale"]]


def check_low(case: Case, found: list[Tensor]) -> None:
    """Both bounds, for models in bfloat16 or float16."""
    # What elect multiplies the dual frame with is rounded as well, which is half an ulp of its digits.
    digits = DIGITS[case.operands[0].dtype]
    floor = 2.0 ** (23 - digits) if case.op.name == "elect" else matrix_cases.FLOOR
    matrix_cases.check(as_taken(case), found, floor=floor)
    if case.op.name in ("delta_gram", "delta_project", "project_erase"):
        for result, truth, plain in zip(found, case.truth(), as_torch(case)):
            ours, theirs = error(result, truth), error(plain, truth)
            assert ours.max() <= 2 * theirs.max(), (float(ours.max()), float(theirs.max()))
            assert ours.mean() <= 2 * theirs.mean(), (float(ours.mean()), float(theirs.mean()))


def resolved(size: tuple[int, int, int], k: int, dtype: str = "bf16", view: str = "rows") -> Case:
    """A call of resolve on bases that bfloat16 can hold, so that scores are exact products of the operands."""
    case = make("resolve", dtype, size, view=view)
    if dtype == "bf16":
        case.operands[1] = case.operands[1].to(BF16).float()
    return Case(case.op, case.operands, {"k": k})
