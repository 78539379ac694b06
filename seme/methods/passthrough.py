"""One model as it is, or its weights times a number.

``scale w``. With slices of layers it stacks layers of several models; as in mergekit a configured base model is one
more input, so that only one model may be named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme.methods._passes import Group, Merge
from seme.methods._registry import PerModel, method
from seme.ops.weighted_sum import OP as WEIGHTED_SUM

if TYPE_CHECKING:
    import torch


def reference(tensors: Sequence[torch.Tensor], *, base: int | None, scale: Sequence[float]) -> torch.Tensor:
    """The formula in float64."""
    return scale[0] * tensors[0].double()


@method(
    "passthrough",
    reference=reference,
    source="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    base="input",
    max_inputs=1,
)
def merge(
    group: Group,
    *,
    scale: PerModel = 1.0,  # type: ignore[assignment]
) -> Merge:
    """One pass.

    Args:
        scale: what the weights are multiplied by.
    """
    yield group.write(WEIGHTED_SUM, weights=scale)
