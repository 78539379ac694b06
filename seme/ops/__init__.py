"""The ops: one file each, holding schema, check, reference and the calls of the kernels.

The functions take torch tensors; ``import seme.ops.library`` makes them available as ``torch.ops.seme.*``.
"""

from seme.ops.delta_gram import delta_gram
from seme.ops.delta_project import delta_project
from seme.ops.elect import elect
from seme.ops.elect_select import elect_select
from seme.ops.importance_fusion import importance_fusion
from seme.ops.importance_histogram import importance_histogram
from seme.ops.inner_products import inner_products
from seme.ops.line_products import line_products
from seme.ops.line_sum import line_sum
from seme.ops.magnitude_histogram import magnitude_histogram
from seme.ops.nearswap import nearswap
from seme.ops.nonfinite import nonfinite
from seme.ops.overlap_counts import overlap_counts
from seme.ops.project_erase import project_erase
from seme.ops.ram import ram
from seme.ops.resolve import resolve
from seme.ops.row_divergence import row_divergence
from seme.ops.sce import sce
from seme.ops.selected_squares import selected_squares
from seme.ops.semantic_energy import semantic_energy
from seme.ops.task_vector_sum import task_vector_sum
from seme.ops.tie_counts import tie_counts
from seme.ops.ties import ties
from seme.ops.trimmed_l1 import trimmed_l1
from seme.ops.variance_histogram import variance_histogram
from seme.ops.variance_ties import variance_ties
from seme.ops.weighted_gram import weighted_gram
from seme.ops.weighted_sum import weighted_sum

__all__ = [
    "delta_gram",
    "delta_project",
    "elect",
    "elect_select",
    "importance_fusion",
    "importance_histogram",
    "inner_products",
    "line_products",
    "line_sum",
    "magnitude_histogram",
    "nearswap",
    "nonfinite",
    "overlap_counts",
    "project_erase",
    "ram",
    "resolve",
    "row_divergence",
    "sce",
    "selected_squares",
    "semantic_energy",
    "task_vector_sum",
    "tie_counts",
    "ties",
    "trimmed_l1",
    "variance_histogram",
    "variance_ties",
    "weighted_gram",
    "weighted_sum",
]
