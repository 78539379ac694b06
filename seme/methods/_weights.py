"""Weights that a formula cannot be computed with, found while the merge is planned."""

from __future__ import annotations

import math
from collections.abc import Sequence

from seme import dtypes
from seme.dtypes import DType
from seme.errors import ConfigError
from seme.methods._passes import Group

CANCEL = 1e-6
"""A sum of weights this small, relative to their magnitudes, is what rounding left of zero."""


def check_finite(group: Group, name: str, values: Sequence[float], held: DType) -> None:
    """Refuse values of parameter ``name`` that the dtype they are held in makes infinite."""
    for value in values:
        if not math.isfinite(dtypes.round_to(held, value)):
            raise ConfigError(
                f"parameters.{name}: {value} is infinite in {held}, as tensor {group.name} is merged; "
                "write a smaller number or dtype: float64"
            )


def check_sum(group: Group, weights: Sequence[float], held: DType, switch: str = "normalize") -> None:
    """Refuse weights that ``switch`` cannot divide by, because they add up to 0 or to infinity."""
    rounded = [dtypes.round_to(held, w) for w in weights]
    total = dtypes.round_to(held, math.fsum(rounded))
    if not math.isfinite(total) or abs(total) <= CANCEL * math.fsum(map(abs, rounded)):
        raise ConfigError(
            f"parameters.weight: {', '.join(map(str, weights))} add up to {total:g} for tensor {group.name}, "
            f"and {switch} divides by it; set {switch}: false or other weights"
        )
