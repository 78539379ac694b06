"""Semantics-preserving transformation: from the latent space of one model into that of another.

The two models share labels, given as pairs of indices; widths and the rest of the vocabularies may differ. A latent
vector is resolved into the shared labels in the source and recomposed in the target. All three modes (of
:mod:`seme.semantics.resolve`) are linear in the direction of the vector, so the transformation is one matrix
``[d_source, d_target]``, summed over the labels in tiles:

- ``cosine``: ``sum_i s_hat_i^T s_hat'_i``. The published one; gives a direction (SemAlign equations 1 and 2).
- ``dual``: the same times ``(sum_i s_hat'_i^T s_hat'_i)^-1``. Exact between a space and itself, and under a rotation.
- ``logit``: ``sum_i wg_i^T s'_i``, s' the bases of the target over the shared labels alone. The least-squares solution
  of "the target's logits of the shared labels are the source's"; exact for models of equal logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seme.errors import SemeError, brief
from seme.semantics import labels as vocabularies
from seme.semantics.bases import add_gram_, invert, mirror_
from seme.semantics.head import ROWS
from seme.semantics.resolve import Mode, check, normalized

if TYPE_CHECKING:
    import torch

    from seme.semantics.bases import SemanticBases

    Labels = torch.Tensor | Sequence[tuple[int, int]] | Sequence[str]


@dataclass(frozen=True)
class Transfer:
    """A transformation between two latent spaces.

    Attributes:
        matrix: [d_source, d_target] float64.
        mode: ``cosine``, ``dual`` or ``logit``.
        labels: number of shared labels it was made from.
    """

    matrix: torch.Tensor
    mode: Mode
    labels: int

    def __call__(self, h: torch.Tensor, *, restore_norm: bool = False) -> torch.Tensor:
        """Latent vectors [..., d_source] of the source as latent vectors [..., d_target] of the target, in h's dtype.

        Args:
            h: of any floating-point dtype.
            restore_norm: give the results the lengths of h. Without it ``cosine`` gives the sum of the unit bases
                weighted with cosines, whose length says nothing.
        """
        import torch

        if h.dim() == 0 or h.shape[-1] != len(self.matrix):
            raise SemeError(f"latent vectors: shape {list(h.shape)}; the source is of width {len(self.matrix)}")
        x = h.to(self.matrix)
        out = (normalized(x) if self.mode == "cosine" else x) @ self.matrix
        if restore_norm:
            out = normalized(out) * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return out.to(h.dtype)


def transfer(
    source: SemanticBases,
    target: SemanticBases,
    labels: Labels | None = None,
    mode: Mode = "logit",
) -> Transfer:
    """The transformation from one model's latent space into another's.

    Args:
        source: bases of the model the vectors are from.
        target: bases of the model they are for, on the same device.
        labels: what the two share: pairs of indices [n, 2], or tokens as both tokenizers store them; default: see
            :func:`shared_labels`. As many as the target is wide at least, and better many times that.
        mode: see above.

    Raises:
        SemeError: labels that are not there, or none at all.
    """
    import torch

    check(mode)
    pairs = _pairs(source, target, labels)
    whole = source.size == target.size == len(pairs) and bool((pairs == torch.arange(len(pairs))[:, None]).all())
    device = target.head.device
    cross = torch.zeros((source.width, target.width), dtype=torch.float64, device=device)
    gram = torch.zeros((target.width, target.width), dtype=torch.float64, device=device)
    needs_gram = mode != "cosine" and not whole
    for start in range(0, len(pairs), ROWS):
        ours, theirs = pairs[start : start + ROWS].T
        if mode == "logit":
            x, y = source.rows(ours), target.rows(theirs)
        else:
            x, y = source.units(ours), target.units(theirs)
        y = y.double()
        cross.addmm_(x.double().T, y)
        if needs_gram:
            add_gram_(gram, y)
    if needs_gram:
        mirror_(gram)
        cross = cross @ invert(gram, f"{target.head.name}, shared labels").matrix
    elif mode != "cosine":
        cross = cross @ (target.inverse if mode == "logit" else target.frame_inverse)
    return Transfer(cross, mode, len(pairs))


def shared_labels(source: SemanticBases, target: SemanticBases) -> torch.Tensor:
    """Labels that stand for the same bytes in both vocabularies: pairs of indices [n, 2] int64, by source index.

    Raises:
        SemeError: a model has no vocabulary that can be read.
    """
    import torch

    sizes = (source.size, target.size)
    return torch.tensor(vocabularies.shared(source.head.folder, target.head.folder, sizes)).view(-1, 2)


def _pairs(source: SemanticBases, target: SemanticBases, labels: Labels | None) -> torch.Tensor:
    import torch

    if labels is None:
        pairs = shared_labels(source, target)
    elif len(labels) and isinstance(labels[0], str):
        pairs = torch.tensor([_find(bases, labels) for bases in (source, target)]).T
    else:
        pairs = torch.as_tensor(labels).cpu()
    if pairs.dim() != 2 or pairs.shape[1:] != (2,) or pairs.is_floating_point() or not len(pairs):
        raise SemeError(f"shared labels: shape {list(pairs.shape)} of {pairs.dtype}; expected pairs of indices [n, 2]")
    for column, bases in zip(pairs.T, (source, target)):
        if int(column.min()) < 0 or int(column.max()) >= bases.size:
            raise SemeError(
                f"shared labels: {int(column.min())} to {int(column.max())}; {bases.head.name} has {bases.size} labels"
            )
    return pairs.long()


def _find(bases: SemanticBases, tokens: Sequence[object] | torch.Tensor) -> list[int]:
    known = vocabularies.by_name(bases.head.folder, bases.size)
    for token in tokens:
        if not isinstance(token, str) or token not in known:
            raise SemeError(f"shared labels: token {brief(token)} is not in the vocabulary of {bases.head.folder}")
    return [known[str(token)] for token in tokens]
