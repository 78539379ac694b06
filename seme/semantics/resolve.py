"""Resolution: a latent vector taken apart into components along the labels, and put together again.

Three modes, that differ in the coefficient ``a_i`` of label i and in the vector it belongs to:

- ``cosine``: ``a_i = <r, s_hat_i> / |r|``, recomposed as ``sum_i a_i s_hat_i``. This is what is published (SemAlign
  section 3.2, equations 1 and 2; SeMe, arXiv 2505.20144). Only the direction is meant to come back, and it comes back
  approximately: how well depends on the model, so :func:`round_trip` says it.
- ``dual``: ``a_i = <r, s_hat_i>``, recomposed in the dual frame as ``sum_i a_i b_i``. Exact.
- ``logit``: ``a_i = <r, wg_i>``, the logits, recomposed as ``sum_i a_i s_i``. Exact.

Exact means up to rounding, for vectors in the span of the head's rows; that is every vector if the rank is d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from seme.errors import SemeError

if TYPE_CHECKING:
    import torch

    from seme.semantics.bases import SemanticBases

Mode = Literal["cosine", "dual", "logit"]
MODES: tuple[str, ...] = get_args(Mode)


def coefficients(
    r: torch.Tensor, bases: SemanticBases, start: int = 0, stop: int | None = None, mode: Mode = "cosine"
) -> torch.Tensor:
    """``a_i`` of the labels from ``start`` to ``stop``.

    Args:
        r: latent vectors, [..., d], of any floating-point dtype.
        bases: of the model the vectors are from.
        start: first label.
        stop: label after the last; default: all. Go in tiles when there are many vectors.
        mode: see above. A zero vector has zero coefficients.

    Returns:
        [..., stop - start] in the dtype of the bases.
    """
    check(mode, r, bases)
    stop = bases.size if stop is None else stop
    x = r.to(bases.head.device, bases.dtype)
    if mode == "logit":
        return x @ bases.rows(slice(start, stop)).T
    if mode == "cosine":
        x = normalized(x)
    return x @ bases.tile(start, stop).T


def recompose(a: torch.Tensor, bases: SemanticBases, start: int = 0, mode: Mode = "cosine") -> torch.Tensor:
    """The vector that coefficients describe, [..., d]: the sum over the labels from ``start`` on, one per coefficient.

    Args:
        a: coefficients, [..., n].
        bases: of the model the vectors are for.
        start: label of the first coefficient. Sums of tiles add up to the whole.
        mode: of the coefficients.
    """
    check(mode)
    stop = start + a.shape[-1]
    if mode == "logit":
        return a @ bases.vectors(slice(start, stop))
    return a @ (bases.dual(start, stop) if mode == "dual" else bases.tile(start, stop))


def resolution(
    r: torch.Tensor, bases: SemanticBases, mode: Mode = "cosine", *, restore_norm: bool = False
) -> torch.Tensor:
    """The recomposition of all coefficients of r, [..., d], in the dtype of the bases.

    For ``cosine`` and ``dual`` the sum over all labels is one product with the frame operator, which is made once and
    kept; for ``logit`` it goes through the labels in tiles.

    Args:
        r: latent vectors, [..., d].
        bases: of their model.
        mode: see above.
        restore_norm: give the result the length of r, which ``cosine`` loses.
    """
    check(mode, r, bases)
    import torch

    x = r.to(bases.head.device, bases.dtype)
    if mode == "logit":
        out = torch.zeros_like(x)
        for index in bases.head.tiles():
            out += (x @ bases.rows(index).T) @ bases.vectors(index)
    elif mode == "dual":
        out = ((x.double() @ bases.frame) @ bases.frame_inverse).to(x.dtype)
    else:
        out = (normalized(x).double() @ bases.frame).to(x.dtype)
    return normalized(out) * torch.linalg.vector_norm(x, dim=-1, keepdim=True) if restore_norm else out


def round_trip(r: torch.Tensor, bases: SemanticBases, mode: Mode = "cosine") -> torch.Tensor:
    """The diagnostic: the cosine of each vector with its resolution, [...] float64; 0 for a zero vector.

    1 says that the coefficients describe the direction of the vector fully.
    """
    x = r.to(bases.head.device).double()
    return (normalized(x) * normalized(resolution(r, bases, mode).double())).sum(-1)


def normalized(x: torch.Tensor) -> torch.Tensor:
    """Vectors at length one; zero stays zero."""
    import torch

    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


def check(mode: str, r: torch.Tensor | None = None, bases: SemanticBases | None = None) -> None:
    """Refuse an unknown mode and vectors of another width.

    Raises:
        SemeError: with what was found and what was expected.
    """
    if mode not in MODES:
        raise SemeError(f"mode: {mode!r}; expected one of {', '.join(MODES)}")
    if r is not None and bases is not None and (r.dim() == 0 or r.shape[-1] != bases.width):
        raise SemeError(f"latent vectors: shape {list(r.shape)}; the bases are of width {bases.width}")
