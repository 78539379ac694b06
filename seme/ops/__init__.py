"""The ops: one file each, holding schema, check, reference and the calls of the kernels.

The functions take torch tensors; ``import seme.ops.library`` makes them available as ``torch.ops.seme.*``.
"""

from seme.ops.inner_products import inner_products
from seme.ops.magnitude_histogram import magnitude_histogram
from seme.ops.nonfinite import nonfinite
from seme.ops.task_vector_sum import task_vector_sum
from seme.ops.tie_counts import tie_counts
from seme.ops.ties import ties
from seme.ops.trimmed_l1 import trimmed_l1
from seme.ops.weighted_sum import weighted_sum

__all__ = [
    "inner_products",
    "magnitude_histogram",
    "nonfinite",
    "task_vector_sum",
    "tie_counts",
    "ties",
    "trimmed_l1",
    "weighted_sum",
]
