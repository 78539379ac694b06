"""TIES: trim task vectors, elect a sign per element, average the models that agree with it.

For every task vector ``d_i = w_i - w0``: keep its ``density`` largest magnitudes and zero the rest; weight it;
elect ``sign(sum_i weight_i d_i)``, where 0 votes plus; add what agrees with the elected sign and divide by the
weights that agree (``normalize``); ``w0 + lambda *`` that. Yadav et al. 2023, arXiv 2306.01708.

Parameters, defaults and order of operations are mergekit's: trimming is per tensor, weights come before the
election. Among equal magnitudes at the threshold those of lowest index are kept, so exactly
``max(1, int(density * numel))`` elements remain; mergekit leaves the choice among them to an unstable sort.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Annotated

from seme import dtypes
from seme.methods._magnitude import Cut, countdown, cuts, kept_count
from seme.methods._passes import Group, Merge, Pass, Reduced
from seme.methods._registry import FRACTION, PerExpert, method
from seme.methods.task_arithmetic import check
from seme.ops.task_vector_sum import OP as TASK_VECTOR_SUM
from seme.ops.ties import OP as TIES
from seme.ops.trimmed_l1 import OP as TRIMMED_L1

if TYPE_CHECKING:
    import torch

SMALL_NORM = 1e-7
"""L1 norms below this are not rescaled, as in mergekit."""


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    base: int,
    weight: Sequence[float],
    density: Sequence[float],
    normalize: bool = True,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> torch.Tensor:
    """The paper's three steps in float64, with a sort for the trim."""
    import torch

    origin = tensors[base].double()
    weighted = []
    for tensor, w, d in zip((t for i, t in enumerate(tensors) if i != base), weight, density):
        delta = (tensor.double() - origin).reshape(-1)
        if d < 1:
            kept = kept_count(d, delta.numel()) if d > 0 else 0
            order = torch.sort(delta.abs(), descending=True, stable=True).indices
            trimmed = torch.zeros_like(delta)
            trimmed[order[:kept]] = delta[order[:kept]]
            before, after = delta.abs().sum(), trimmed.abs().sum()
            if rescale and before >= SMALL_NORM and after >= SMALL_NORM:
                trimmed = trimmed * (before / after)
            delta = trimmed
        weighted.append(w * delta.reshape(origin.shape))
    stack = torch.stack(weighted)
    elected = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agrees = torch.sign(stack) == elected
    merged = (stack * agrees).sum(0)
    if normalize:
        shape = (-1,) + (1,) * origin.dim()
        divisor = (torch.tensor(list(weight), dtype=torch.float64).reshape(shape) * agrees).sum(0)
        merged = merged / torch.where(divisor == 0, 1.0, divisor)
    return origin + lambda_ * merged


def _l1_factors(group: Group, found: Sequence[Cut]) -> Generator[Pass, Reduced, list[float]]:
    """Per expert the L1 norm of its task vector over that of what the trim left, in the compute dtype."""
    sums = yield group.reduce(
        TRIMMED_L1,
        thresholds=[threshold for threshold, _ in found],
        tie_quotas=[quota for _, quota in found],
        countdown=countdown(group, found),
    )
    compute, n = group.compute_dtype, len(found)
    factors = []
    for i in range(n):
        before = dtypes.round_to(compute, math.fsum(sums.data[2 * i :: 2 * n]))
        after = dtypes.round_to(compute, math.fsum(sums.data[2 * i + 1 :: 2 * n]))
        small = before < SMALL_NORM or after < SMALL_NORM
        factors.append(1.0 if small else dtypes.round_to(compute, before / after))
    return factors


@method("ties", reference=reference, source="https://arxiv.org/abs/2306.01708", check=check)
def merge(
    group: Group,
    *,
    weight: PerExpert,
    density: Annotated[PerExpert, FRACTION] = 1.0,  # type: ignore[assignment]
    normalize: bool = True,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Merge:
    """A sample, one pass for the thresholds (rarely more), one for the output.

    Args:
        weight: weight of the model's task vector; a negative one turns its vote around.
        density: share of the task vector's elements that is kept, per tensor.
        normalize: divide by the sum of the weights that agree with the elected sign.
        rescale: scale each trimmed task vector back to the L1 norm it had.
        int8_mask: accepted for mergekit's sake; masks are never stored here.
        lambda: scale of the merged task vector.
    """
    if not group.experts:
        yield group.write(TASK_VECTOR_SUM, weights=())  # the base model
        return
    found = yield from cuts(group, density)
    factors = [1.0] * len(found)
    if rescale and any(d < 1 for d in density):
        factors = yield from _l1_factors(group, found)
    yield group.write(
        TIES,
        weights=weight,
        thresholds=[threshold for threshold, _ in found],
        tie_quotas=[quota for _, quota in found],
        factors=factors,
        normalize=normalize,
        scale=lambda_,
        countdown=countdown(group, found),
    )
