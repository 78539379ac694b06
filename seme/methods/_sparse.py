"""What the methods that merge parts of task vectors share: cuts through magnitudes, rescaling, the merge itself.

A method decides which elements of each task vector are kept (a :class:`Selection`); the rest is here, in mergekit's
order of operations: take the kept part, scale it back to the L1 norm of the whole (``rescale``), weight it, drop
what disagrees with the elected sign (``elect``), add up, divide (``normalize``), scale by lambda, add to the base.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seme import dtypes
from seme.methods._magnitude import countdown, cuts
from seme.methods._passes import Countdown, Group, Merge, Pass, Reduced
from seme.methods.task_arithmetic import normalizer
from seme.ops._philox import CERTAIN
from seme.ops.task_vector_sum import OP as TASK_VECTOR_SUM
from seme.ops.ties import OP as TIES
from seme.ops.trimmed_l1 import OP as TRIMMED_L1

if TYPE_CHECKING:
    import torch

SMALL_NORM = 1e-7
"""L1 norms below this are not rescaled, as in mergekit."""


@dataclass(frozen=True)
class Selection:
    """Which elements of each task vector are kept.

    Attributes:
        arguments: of the ops, see :func:`seme.ops._task_vectors.check_selection`.
        countdown: what lets chunks share the quotas.
    """

    arguments: dict[str, Any]
    countdown: Countdown | None = None


def by_magnitude(
    group: Group, counts: Sequence[int], outliers: Sequence[int] = ()
) -> Generator[Pass, Reduced, Selection | None]:
    """The first ``counts[i]`` elements of each task vector by falling magnitude, but not the first ``outliers[i]``.

    None if that is all of every task vector.
    """
    dropped = list(outliers) if any(outliers) else []
    if not dropped and all(count == group.numel for count in counts):
        return None
    found = yield from cuts(group, [*counts, *dropped])
    thresholds, quotas = [threshold for threshold, _ in found], [quota for _, quota in found]
    return Selection({"thresholds": thresholds, "tie_quotas": quotas}, countdown(group, found))


def stream(group_name: str, expert: int, seed: int) -> int:
    """The Philox key, 63 bits, of the numbers that an expert's elements of a tensor draw."""
    from hashlib import blake2b

    digest = blake2b(f"{seed}/{expert}/{group_name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def by_chance(group: Group, density: Sequence[float]) -> Selection | None:
    """Every element with a probability of ``density[i]``; None if that is all of every task vector."""
    if all(d >= 1 for d in density):
        return None
    if group.compute_dtype == dtypes.bfloat16:  # as a tensor of mergekit's holds it
        density = [dtypes.round_to(dtypes.bfloat16, d) for d in density]
    seeds = [stream(group.name, expert, group.seed) for expert in group.experts]
    return Selection({"chances": [chance(d) for d in density], "seeds": seeds})


def by_rank(group: Group, density: Sequence[float], epsilon: Sequence[float]) -> Selection | None:
    """Every element with a probability that grows from ``density[i] - epsilon[i]`` to ``density[i] + epsilon[i]`` with
    its rank by magnitude in its row, see :func:`row_of`; None if that is all of every task vector."""
    row = row_of(group.inputs[0].shape)
    ends = [rank_ends(d, e) for d, e in zip(density, epsilon)]
    if row < 2 or all(low == high for low, high in ends):
        return by_chance(group, density)
    seeds = [stream(group.name, expert, group.seed) for expert in group.experts]
    chances, spreads = [low for low, _ in ends], [high - low for low, high in ends]
    return Selection({"chances": chances, "seeds": seeds, "spreads": spreads, "row": row})


def rank_ends(density: float, epsilon: float) -> tuple[int, int]:
    """Chances of the smallest and of the greatest magnitude in a row, in units of 2^-32."""
    if not 0 < density < 1:
        epsilon = 0.0
    return chance(density - epsilon), chance(density + epsilon)


def row_of(shape: tuple[int, ...]) -> int:
    """Elements of a row along the last dimension; a scalar is a row of its own."""
    return shape[-1] if shape else 1


def chance(probability: float) -> int:
    """A probability in units of 2^-32."""
    return min(CERTAIN, max(0, round(probability * CERTAIN)))


def _l1_factors(group: Group, selection: Selection) -> Generator[Pass, Reduced, list[float]]:
    """Per expert the L1 norm of its task vector over that of what is kept, as mergekit's tensors hold them."""
    sums = yield group.reduce(TRIMMED_L1, countdown=selection.countdown, **selection.arguments)
    held, n = group.compute_dtype, len(group.experts)
    if "chances" in selection.arguments and held == dtypes.float16:
        held = dtypes.float32  # what mergekit masks float16 at random in
    factors = []
    for i in range(n):
        before = dtypes.round_to(held, math.fsum(sums.data[2 * i :: 2 * n]))
        after = dtypes.round_to(held, math.fsum(sums.data[2 * i + 1 :: 2 * n]))
        small = before < SMALL_NORM or after < SMALL_NORM
        factors.append(1.0 if small else dtypes.round_to(held, before / after))
    return factors


def merge_kept(
    group: Group,
    selection: Selection | None,
    *,
    elect: bool,
    weight: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Merge:
    """Merge what is kept of the task vectors; all of them if ``selection`` is None."""
    if not group.experts:
        yield group.write(TASK_VECTOR_SUM, weights=())  # the base model
        return
    arguments: dict[str, Any] = {"weights": weight, "scale": lambda_}
    if selection is not None:
        arguments |= selection.arguments
        arguments["countdown"] = selection.countdown
        if rescale:
            arguments["factors"] = yield from _l1_factors(group, selection)
    if elect:
        yield group.write(TIES, normalize=normalize, **arguments)
    else:
        divisor = normalizer(group.compute_dtype, weight) if normalize else 1.0
        yield group.write(TASK_VECTOR_SUM, divisor=divisor, **arguments)


def reference(
    origin: torch.Tensor,
    kept: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    elect: bool,
    weight: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> torch.Tensor:
    """The same in float64, of task vectors and masks of what is kept of them, in the shape of the base."""
    import torch

    weighted = []
    for (delta, mask), w in zip(kept, weight):
        part = delta * mask
        before, after = delta.abs().sum(), part.abs().sum()
        if rescale and not mask.all() and before >= SMALL_NORM and after >= SMALL_NORM:
            part = part * (before / after)
        weighted.append(w * part)
    if not weighted:
        return origin
    stack = torch.stack(weighted)
    weights = torch.tensor(list(weight), dtype=torch.float64).reshape((-1,) + (1,) * origin.dim())
    elected = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agrees = torch.sign(stack) == elected if elect else torch.ones_like(stack)
    merged = (stack * agrees).sum(0)
    if normalize:
        divisor = (weights * agrees).sum(0)
        merged = merged / torch.where(divisor == 0, 1.0, divisor)
    return origin + lambda_ * merged
