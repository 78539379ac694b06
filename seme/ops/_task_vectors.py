"""What the ops on task vectors share: keys of magnitudes, selection with tie quotas, sums in lanes.

The magnitude key of a value is its bits without the sign, in the compute dtype: an integer that grows with the
magnitude (31 bits for float32, 15 for bfloat16 and float16, 63 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from seme import dtypes
from seme.dtypes import DType
from seme.errors import OpError
from seme.native import BLOCK
from seme.ops._op import Params, Spec, check_per_tensor, check_tensors
from seme.ops._philox import CERTAIN, numbers

if TYPE_CHECKING:
    import torch

UNLIMITED = 2**62
"""Tie quotas from here on keep every tie."""
LANES = 64
LONGEST_ROW = 2**31
"""Products of a rank and a chance have 63 bits."""


def check_base(op: str, specs: Sequence[Spec], compute_dtype: DType | None, least: int = 1) -> DType:
    """A base and at least ``least`` other tensors; returns the compute dtype."""
    compute = check_tensors(op, specs, compute_dtype)
    if len(specs) - 1 < least:
        raise OpError(f"{op}: no tensors besides the base")
    return compute


def check_integers(op: str, name: str, values: Sequence[int]) -> list[int]:
    """Integers in [0, 2^63), as keys, quotas and shifts are."""
    for i, value in enumerate(values):
        if not 0 <= int(value) < 2**63:
            raise OpError(f"{op}: {name}[{i}] is {value}, expected 0 to 2^63 - 1")
    return [int(v) for v in values]


SELECTION = (
    "int[] thresholds=[], int[] tie_quotas=[], int[] chances=[], int[] seeds=[], int offset=0, "
    "int[] spreads=[], int row=0"
)
"""The arguments of a selection, in the schema language."""


def check_cuts(op: str, count: int, thresholds: Sequence[int], tie_quotas: Sequence[int]) -> Params:
    """None, or for each of ``count`` task vectors one or two thresholds with their quotas."""
    if thresholds and len(thresholds) != 2 * count:
        check_per_tensor(op, "thresholds", thresholds, count)
    check_per_tensor(op, "tie_quotas", tie_quotas, len(thresholds))
    return {
        "thresholds": check_integers(op, "thresholds", thresholds),
        "tie_quotas": check_integers(op, "tie_quotas", tie_quotas),
    }


def check_selection(
    op: str,
    specs: Sequence[Spec],
    *,
    thresholds: Sequence[int] = (),
    tie_quotas: Sequence[int] = (),
    chances: Sequence[int] = (),
    seeds: Sequence[int] = (),
    offset: int = 0,
    spreads: Sequence[int] = (),
    row: int = 0,
) -> Params:
    """What is kept of each of the n task vectors; without arguments all of it.

    Args:
        op: name of the op, for messages.
        specs: of the base and the n other tensors.
        thresholds: magnitude keys, n or twice as many: elements above the first n are kept, but not those above the
            second.
        tie_quotas: as many numbers: of the elements equal to the threshold, how many count as above it, in element
            order; 2^62 and more: all.
        chances: n integers: of what the cuts leave, an element is kept with a chance of ``chances[i] / 2^32``.
        seeds: n keys of 63 bits; with the index of an element they determine the number it draws, see
            :mod:`seme.ops._philox`.
        offset: index in the tensor of the first element that the op is given.
        spreads: n integers, without thresholds: the chance of an element grows by ``spreads[i] * rank / (row - 1)``,
            rounded down, where ranks count from 0 by rising magnitude, of equal ones by index, within each row.
        row: elements of a row, of which the tensors are made.
    """
    count = len(specs) - 1
    if chances:
        check_per_tensor(op, "chances", chances, count)
    check_per_tensor(op, "seeds", seeds, len(chances))
    if any(not 0 <= chance <= CERTAIN for chance in chances):
        raise OpError(f"{op}: chances are {list(chances)}, expected 0 to 2^32")
    check_ranks(op, specs, thresholds, chances, spreads, row)
    return {
        **check_cuts(op, count, thresholds, tie_quotas),
        "chances": list(chances),
        "seeds": check_integers(op, "seeds", seeds),
        "offset": check_integers(op, "offset", [offset])[0],
        "spreads": list(spreads),
        "row": row,
    }


def check_ranks(
    op: str,
    specs: Sequence[Spec],
    thresholds: Sequence[int],
    chances: Sequence[int],
    spreads: Sequence[int],
    row: int,
) -> None:
    """Whole rows and chances from 0 to 2^32, where there are ranks."""
    if bool(spreads) != (row != 0):
        raise OpError(f"{op}: spreads and row go together")
    if not spreads:
        return
    check_per_tensor(op, "spreads", spreads, len(chances))
    if thresholds:
        raise OpError(f"{op}: spreads and thresholds exclude each other")
    if not 0 < row <= LONGEST_ROW or specs[0].numel % row:
        raise OpError(f"{op}: row is {row} for {specs[0].numel} elements, expected whole rows of 1 to 2^31")
    if any(spread < 0 or chance + spread > CERTAIN for chance, spread in zip(chances, spreads)):
        raise OpError(f"{op}: spreads are {list(spreads)}, expected 0 or more, and with the chances at most 2^32")


def native_selection(selection: Params) -> tuple[Any, ...]:
    """A checked selection, without ranks, in the form that the compiled modules take."""
    return tuple(selection[name] for name in ("thresholds", "tie_quotas", "chances", "seeds", "offset"))


def native_ranks(selection: Params) -> tuple[list[int], int]:
    """The ranks of a checked selection in the form that the compiled module takes."""
    return selection["spreads"], selection["row"]


def deltas(tensors: Sequence[torch.Tensor], compute_dtype: DType) -> list[torch.Tensor]:
    """The task vectors of all tensors but the first, flat, in the compute dtype."""
    compute = compute_dtype.to_torch()
    base = tensors[0].to(compute).reshape(-1)
    return [t.to(compute).reshape(-1) - base for t in tensors[1:]]


def magnitude_keys(delta: torch.Tensor) -> torch.Tensor:
    """int64 keys of a tensor's magnitudes. NaN has one key, the greatest: that of the quiet NaN without payload."""
    import torch

    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[delta.element_size()]
    mask = 2 ** (8 * delta.element_size() - 1) - 1
    keys: torch.Tensor = delta.contiguous().view(bits).to(torch.int64) & mask
    nan = torch.tensor(float("nan"), dtype=delta.dtype).view(bits).item()
    return keys.clamp(max=nan & mask)


def above(delta: torch.Tensor, threshold: int, quota: int) -> torch.Tensor:
    """True for keys above the threshold, and for the first ``quota`` that equal it."""
    keys = magnitude_keys(delta)
    tied = keys == threshold
    if quota >= UNLIMITED:
        return (keys > threshold) | tied
    return (keys > threshold) | (tied & (tied.cumsum(0) <= quota))


def ranks(delta: torch.Tensor, row: int) -> torch.Tensor:
    """int64: how many elements of an element's row come before it, by rising magnitude, of equal ones by index."""
    import torch

    keys = magnitude_keys(delta).view(-1, row)
    order = torch.sort(keys, dim=1, stable=True).indices
    return torch.empty_like(order).scatter_(1, order, torch.arange(row, device=delta.device).expand_as(order)).view(-1)


def ranked(
    tensors: Sequence[torch.Tensor], selection: Params, compute_dtype: DType
) -> tuple[list[torch.Tensor], Params]:
    """Tensors and selection that keep the same without ranks: what is not kept by its rank equals the base."""
    import torch

    base, *others = tensors
    chances, row = list(selection["chances"]), selection["row"]
    compute = compute_dtype.to_torch()
    for i, spread in enumerate(selection["spreads"]):
        if spread == 0:
            continue
        rounded = others[i].to(compute).reshape(-1)
        origin = base.to(compute).reshape(-1)
        draws = numbers(selection["seeds"][i], selection["offset"], rounded.numel(), rounded.device)
        # draw < chance + floor(rank * spread / (row - 1))
        least = (draws - chances[i] + 1) * max(1, row - 1)
        keep = ranks(rounded - origin, row) * spread >= least
        others[i] = torch.where(keep, rounded, origin).view(base.shape)
        chances[i] = CERTAIN
    return [base, *others], {**selection, "chances": chances, "spreads": [], "row": 0}


def kept(tensors: Sequence[torch.Tensor], compute_dtype: DType, **selection: Any) -> list[torch.Tensor]:
    """:func:`deltas`, 0 where the selection does not keep the element."""
    import torch

    found = []
    tensors, selection = ranked(tensors, selection, compute_dtype)
    thresholds, tie_quotas, chances, seeds, offset = native_selection(selection)
    whole = deltas(tensors, compute_dtype)
    for i, delta in enumerate(whole):
        keep = torch.ones(delta.shape, dtype=torch.bool, device=delta.device)
        if thresholds:
            keep &= above(delta, thresholds[i], tie_quotas[i])
        if len(thresholds) > len(whole):
            keep &= ~above(delta, thresholds[i + len(whole)], tie_quotas[i + len(whole)])
        if chances:
            keep &= numbers(seeds[i], offset, delta.numel(), delta.device) < chances[i]
        found.append(torch.where(keep, delta, 0.0))
    return found


def weighted(
    found: Sequence[torch.Tensor], weights: Sequence[float], factors: Sequence[float], compute_dtype: DType
) -> list[torch.Tensor]:
    """Task vectors times factor times weight, each product rounded to the compute dtype, in the arithmetic type."""
    compute, held = compute_dtype.to_torch(), dtypes.arithmetic(compute_dtype).to_torch()
    terms = []
    for delta, weight, factor in zip(found, weights, factors):
        if factor != 1.0:
            delta = (delta.to(held) * factor).to(compute)
        terms.append((delta * weight).to(held))
    return terms


def lane_sums(values: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """float64 sums of blocks of values, in 64 lanes combined by halving.

    Args:
        values: float64 [rows, n].
        block: values in a block.

    Returns:
        float64 [blocks, rows].
    """
    import torch

    rows, n = values.shape
    blocks, steps = -(-n // block), -(-block // LANES)
    padded = torch.nn.functional.pad(values, (0, blocks * block - n)).view(rows, blocks, block)
    padded = torch.nn.functional.pad(padded, (0, steps * LANES - block)).view(rows, blocks, steps, LANES)
    total = torch.zeros(rows, blocks, LANES, dtype=torch.float64, device=values.device)
    for step in range(steps):
        total = total + padded[:, :, step]
    width = LANES
    while width > 1:
        width //= 2
        total = total[..., :width] + total[..., width : 2 * width]
    return total[..., 0].T.contiguous()


INT64 = dtypes.BY_NAME["int64"]
