"""The ops: one file each, holding schema, check, reference and the calls of the kernels.

The functions take torch tensors; ``import seme.ops.library`` makes them available as ``torch.ops.seme.*``.
"""

from seme.ops.delta_gram import delta_gram
from seme.ops.delta_project import delta_project
from seme.ops.elect import elect
from seme.ops.elect_select import elect_select
from seme.ops.inner_products import inner_products
from seme.ops.line_products import line_products
from seme.ops.line_sum import line_sum
from seme.ops.magnitude_histogram import magnitude_histogram
from seme.ops.nearswap import nearswap
from seme.ops.nonfinite import nonfinite
from seme.ops.project_erase import project_erase
from seme.ops.resolve import resolve
from seme.ops.semantic_energy import semantic_energy
from seme.ops.task_vector_sum import task_vector_sum
from seme.ops.tie_counts import tie_counts
from seme.ops.ties import ties
from seme.ops.trimmed_l1 import trimmed_l1
from seme.ops.weighted_gram import weighted_gram
from seme.ops.weighted_sum import weighted_sum

__all__ = [
    "delta_gram",
    "delta_project",
    "elect",
    "elect_select",
    "inner_products",
    "line_products",
    "line_sum",
    "magnitude_histogram",
    "nearswap",
    "nonfinite",
    "project_erase",
    "resolve",
    "semantic_energy",
    "task_vector_sum",
    "tie_counts",
    "ties",
    "trimmed_l1",
    "weighted_gram",
    "weighted_sum",
]
