"""The ops: one file each, holding schema, check, reference and the calls of the kernels.

The functions take torch tensors; ``import seme.ops.library`` makes them available as ``torch.ops.seme.*``.
"""

from seme.ops.weighted_sum import weighted_sum

__all__ = ["weighted_sum"]
