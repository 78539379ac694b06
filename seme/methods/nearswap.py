"""NearSwap: elements of another model replace the base's where the two are near, and hardly where they are far.

``s w + (1 - s) w0`` with ``s = t / max(|w - w0|, 1e-6)``, at least 0 and at most 1. alchemonaut 2024 (the source
below); parameters and order of operations are mergekit's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme.methods._passes import Group, Merge
from seme.methods._registry import method
from seme.ops.nearswap import LEAST
from seme.ops.nearswap import OP as NEARSWAP
from seme.ops.task_vector_sum import OP as TASK_VECTOR_SUM

if TYPE_CHECKING:
    import torch


def reference(tensors: Sequence[torch.Tensor], *, base: int, t: float) -> torch.Tensor:
    """The formula in float64."""
    origin, other = tensors[base].double(), tensors[1 - base].double()
    share = (t / (other - origin).abs().clamp(min=LEAST)).clamp(0, 1)
    return share * other + (1 - share) * origin


@method(
    "nearswap",
    reference=reference,
    source="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    min_inputs=2,
    max_inputs=2,
)
def merge(group: Group, *, t: float) -> Merge:
    """One pass.

    Args:
        t: elements that are nearer to the base's than this replace them; 0 or less gives the base model.
    """
    if t <= 0:  # in float16 the reciprocal of a small distance is infinite, and 0 times it no number
        assert group.base is not None
        yield group.write(TASK_VECTOR_SUM, (group.base,), weights=())
        return
    yield group.write(NEARSWAP, t=t)
