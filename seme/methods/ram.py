"""RAM: what one model alone changes is added in full, what several change is averaged over those.

For the task vectors ``d_i = w_i - w0``: model i changes an element where ``|d_i| > epsilon``. Where c models do, the
merged task vector is the sum of their ``d_i / c``; ``w0 +`` that. Xia et al. 2026, Reinforced Agent Merging, arXiv
2601.13572; parameters, defaults and order of operations are mergekit's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from seme.methods._passes import Group, Merge
from seme.methods._registry import method
from seme.ops.ram import OP as RAM
from seme.ops.task_vector_sum import OP as TASK_VECTOR_SUM

if TYPE_CHECKING:
    import torch


def reference(tensors: Sequence[torch.Tensor], *, base: int, epsilon: float = 1e-5) -> torch.Tensor:
    """The formula in float64."""
    import torch

    origin = tensors[base].double()
    deltas = torch.stack([t.double() - origin for i, t in enumerate(tensors) if i != base])
    changed = deltas.abs() > epsilon
    return origin + (deltas * changed).sum(0) / changed.sum(0).clamp(min=1)


@method("ram", reference=reference, source="https://arxiv.org/abs/2601.13572")
def merge(group: Group, *, epsilon: float = 1e-5) -> Merge:
    """One pass.

    Args:
        epsilon: a task vector of at most this magnitude changes nothing.
    """
    if not group.experts:
        yield group.write(TASK_VECTOR_SUM, weights=())  # the base model
        return
    yield group.write(RAM, scales=[1.0] * len(group.experts), epsilon=epsilon)
