"""Semantic bases: for every label of the vocabulary, the latent vector that means it.

The head W [v, d] turns a normalised latent vector into logits, so the gain g of the norm before it belongs to it:
``Wg = W diag(g)`` [v, d]. The basis of label i is row i of ``S = (Wg^+)^T`` [v, d], the least-squares solution of
"logits that are one at i and zero elsewhere" (vocabulary-defined semantics; SeMe, arXiv 2505.20144). ``S_hat`` has the
same rows at length one.

Everything comes from the d x d Gram matrix ``G = Wg^T Wg``: ``S = Wg G^-1``. Forming G squares the condition of the
head, so it is summed and inverted in float64; S itself is one float32 matrix product. The products that make up G may
be float32 as long as the head is well-conditioned, see :data:`FLOAT32_LIMIT`. If G is singular or nearly so, ``G^+``
from its eigenvectors takes the place of the inverse.

The unit bases are a frame of the latent space, with more vectors than dimensions, so summing a vector's components
along them does not give the vector back. The dual frame ``B = S_hat (S_hat^T S_hat)^-1`` does:

    sum_i <r, s_i> wg_i = r        sum_i <r, wg_i> s_i = r        sum_i <r, s_hat_i> b_i = r
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from seme.errors import SemeError
from seme.semantics import cache as storage
from seme.semantics.head import ROWS, of_checkpoint, of_matrix

if TYPE_CHECKING:
    import torch

    from seme.checkpoint import ModelRef
    from seme.roles import Override
    from seme.semantics.head import Head, Index

CUT = 1e-10
"""Eigenvalues of a Gram matrix below this share of the largest count as zero."""

CONDITION_LIMIT = 1e10
"""Gram matrices of a larger condition number are not inverted but cut."""

FLOAT32_LIMIT = 40
"""Mean over least eigenvalue of a Gram matrix up to which float32 products are good enough for it: of the Gram matrix
without what all rows share, its coordinates scaled to one size. Rounding is noise in proportion to the mean, and does
most harm to the least. Up to here the bases are nearer to the exact ones than those from a singular value decomposition
in float32 are."""

BLOCK = 256
"""A Gram matrix is halved down to blocks of this width, so that little below its diagonal is multiplied out."""


class Inverse(NamedTuple):
    """The (pseudo-)inverse of a Gram matrix.

    Attributes:
        matrix: [d, d] float64, symmetric.
        rank: number of eigenvalues that were not cut.
        largest: eigenvalue of the Gram matrix; with Cholesky an estimate from below, in general within a few percent.
        least: eigenvalue that was not cut; with Cholesky an estimate from above, as close.
        method: ``cholesky``, or ``eigh`` where eigenvalues were looked at one by one.
    """

    matrix: torch.Tensor
    rank: int
    largest: float
    least: float
    method: str

    @property
    def condition(self) -> float:
        """The condition number of what was not cut, not below 1."""
        return max(self.largest / self.least, 1.0)


class SemanticBases:
    """The semantic bases of one model.

    Bases are not kept but recomputed, a tile of labels at a time, from the rows of the head and one d x d matrix:
    ``tile``, ``vectors`` and ``rows`` take ``2 n d^2`` operations or less for n labels. ``matrix()`` gives all of them.

    Attributes:
        head: the head they belong to.
        size: number of labels, v.
        width: width of the latent space, d.
        dtype: torch dtype of the bases: float32, float64 for a float64 head.
        inverse: ``G^-1`` [d, d] float64 (``G^+`` if the rank is less than d), as exact as bases of their dtype need.
        rank: of G.
        condition: of G, see :class:`Inverse`; that of the head is its square root.
        method: ``cholesky`` or ``eigh``.
        source: ``computed``, or ``cache`` if the inverse was found there.
        stored: the file that keeps the inverse; None if there is none.
        seconds: wall time that computing or finding the inverse took.
    """

    def __init__(self, head: Head, *, cached: bool = False) -> None:
        """Most callers want :meth:`from_checkpoint` or :meth:`from_head`.

        Raises:
            SemeError: the head has inf or NaN in it, or nothing but zeros.
        """
        started = time.perf_counter()
        self.head = head
        self.size, self.width, self.dtype = head.size, head.width, head.working_dtype
        self._key = head.digest() if cached else None
        found = self._from_cache("inverse", {"inverse": (self.width, self.width)})
        self.source = "computed" if found is None else "cache"
        if found is None:
            inverse = self._float32_inverse() or invert(self._gram(), head.name)
            note = json.dumps([inverse.rank, inverse.largest, inverse.least, inverse.method])
            kept = self._to_cache("inverse", {"inverse": inverse.matrix}, note)
        else:
            inverse, kept = Inverse(found[0]["inverse"], *json.loads(found[1])), True
        self.inverse, self.rank = inverse.matrix, inverse.rank
        self.condition, self.method = inverse.condition, inverse.method
        self.stored = storage.path(self._key, "inverse") if self._key is not None and kept else None
        factor = self.inverse if head.gain is None else head.gain[:, None] * self.inverse
        # A power of two takes the squares of very large or small heads, which the inverse has, out of the way.
        largest = float(factor.abs().max())
        far = not 1e-30 < largest < 1e30 and 0 < largest < math.inf
        self._scale = 2.0 ** max(-120, min(120, round(math.log2(largest) / 2))) if far else 1.0
        self._factor = (factor / self._scale**2).to(self.dtype)
        self.seconds = time.perf_counter() - started

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path | ModelRef,
        *,
        fold_norm: bool = True,
        device: str = "cpu",
        cache: bool = True,
        roles: Sequence[Override] = (),
    ) -> SemanticBases:
        """The bases of a model folder, weight file or hub repository.

        Args:
            path: the model. On the CPU its head stays in the file and is read in tiles whenever bases are asked for.
            fold_norm: the gain of the final norm belongs to the head; False takes the head alone.
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            cache: look for the inverse in the cache, and keep it there. Its key is the content of head and gain.
            roles: a recipe's entries ``roles`` (:func:`seme.roles.parse`), for a head that is not found by its name.

        Raises:
            CheckpointError: not a model, or one without a head that can be used.
            BackendError: the device is not there.
        """
        return cls(of_checkpoint(path, fold_norm, device, roles), cached=cache)

    @classmethod
    def from_head(cls, weight: torch.Tensor, gain: torch.Tensor | None = None) -> SemanticBases:
        """The bases of a head [v, d] of any floating-point dtype, on its device.

        Args:
            weight: one row per label.
            gain: [d], the factors of the norm before the head (for Gemma 1 + the stored weight).

        Raises:
            SemeError: a shape or dtype that cannot be, or inf and NaN.
        """
        return cls(of_matrix(weight, gain))

    # --- a tile of labels ---------------------------------------------------------------------------------------------

    def rows(self, index: Index) -> torch.Tensor:
        """``wg_i`` for the labels of an index: rows of the head with the gain, [n, d]."""
        x = self.head.read(index).to(self.dtype)
        return x if self.head.gain is None else x * self.head.gain.to(self.dtype)

    def vectors(self, index: Index) -> torch.Tensor:
        """``s_i`` for the labels of an index: bases at their own length, [n, d]."""
        return self._scaled_vectors(index) * self._scale if self._scale != 1 else self._scaled_vectors(index)

    def _scaled_vectors(self, index: Index) -> torch.Tensor:
        """The same divided by :attr:`_scale`."""
        x = self.head.read(index).to(self.dtype)
        return (x if self._scale == 1 else x * self._scale) @ self._factor

    def units(self, index: Index) -> torch.Tensor:
        """``s_hat_i`` for the labels of an index: bases at length one, [n, d]; a zero basis stays zero."""
        return _to_unit_(self._scaled_vectors(index))[0]

    def tile(self, start: int, stop: int) -> torch.Tensor:
        """``S_hat[start:stop]``, [stop - start, d]. Other tile bounds change no more than the rounding of a product."""
        return self.units(self._slice(start, stop))

    def dual(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """``B[start:stop]``, the dual frame, [stop - start, d]; by default all of it."""
        units = self.units(self._slice(start, self.size if stop is None else stop))
        return units @ self.frame_inverse.to(self.dtype)

    def matrix(self) -> torch.Tensor:
        """``S_hat`` [v, d], made anew at each call."""
        import torch

        out = torch.empty((self.size, self.width), dtype=self.dtype, device=self.head.device)
        for index in self.head.tiles():
            x = self.head.read(index).to(self.dtype)
            torch.mm(x if self._scale == 1 else x * self._scale, self._factor, out=out[index])
            _to_unit_(out[index])
        return out

    def _slice(self, start: int, stop: int) -> slice:
        if not 0 <= start <= stop <= self.size:
            raise SemeError(f"semantic bases: labels {start} to {stop} of {self.size}")
        return slice(start, stop)

    # --- what needs a pass over all labels ----------------------------------------------------------------------------

    @property
    def norms(self) -> torch.Tensor:
        """``|s_i|`` [v] float64. The first use makes a pass over all labels, together with :attr:`frame`."""
        return self._frame_and_norms[1]

    @property
    def zero_rows(self) -> torch.Tensor:
        """Labels (int64) whose row of the head, and so whose basis, is zero."""
        return (self.norms == 0).nonzero().flatten()

    @property
    def frame(self) -> torch.Tensor:
        """The frame operator ``S_hat^T S_hat`` [d, d] float64: ``r @ frame`` is the resolution of r."""
        return self._frame_and_norms[0]

    @functools.cached_property
    def frame_inverse(self) -> torch.Tensor:
        """The (pseudo-)inverse of :attr:`frame`, [d, d] float64."""
        return invert(self.frame, self.head.name).matrix

    @functools.cached_property
    def _frame_and_norms(self) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        shapes = {"frame": (self.width, self.width), "norms": (self.size,)}
        found = self._from_cache("frame", shapes)
        if found is not None:
            return found[0]["frame"], found[0]["norms"]
        frame = torch.zeros(shapes["frame"], dtype=torch.float64, device=self.head.device)
        norms = torch.empty(self.size, dtype=torch.float64, device=self.head.device)
        for index in self.head.tiles():
            units, lengths = _to_unit_(self._scaled_vectors(index))
            norms[index] = lengths * self._scale
            add_gram_(frame, units.double())
        mirror_(frame)
        self._to_cache("frame", {"frame": frame, "norms": norms}, "")
        return frame, norms

    def _gram(self) -> torch.Tensor:
        """``Wg^T Wg`` [d, d] float64, of float64 products. The gain comes in at the end, where it costs d^2."""
        import torch

        gram = torch.zeros((self.width, self.width), dtype=torch.float64, device=self.head.device)
        for index in self.head.tiles():
            add_gram_(gram, self.head.read(index).double())
        mirror_(gram)
        return self._scaled_(gram)

    def _float32_inverse(self) -> Inverse | None:
        """The inverse from float32 products, twice as fast on a CPU; None if they are not good enough for this head.

        What the rows have in common is taken out of them first and put back in float64: it would be most of every
        product, and what matters lies in the rest. Any vector will do for it; here it is a mean of evenly spread rows.
        """
        import torch

        if self.head.device.type != "cpu" or self.dtype != torch.float32:
            return None
        some = torch.linspace(0, self.size - 1, min(self.size, ROWS)).long()
        common = self.head.read(some).float().mean(0)
        gram = torch.zeros((self.width, self.width), dtype=torch.float64)
        rest = torch.zeros(self.width, dtype=torch.float64)
        buffer = torch.empty((min(self.size, ROWS), self.width))
        for index in self.head.tiles():
            x = torch.sub(self.head.read(index), common, out=buffer[: index.stop - index.start])
            add_gram_(gram, x)
            rest += x.sum(0)  # in float32 torch adds up by halves, which loses next to nothing
        mirror_(gram)
        if not 1e-25 < float(gram.diagonal().max()) < 1e35:
            return None  # products of such numbers may be none in float32
        size = self._scaled_(gram).diagonal().sqrt()  # of each coordinate, over the labels
        gain = 1.0 if self.head.gain is None else self.head.gain
        c, rest = gain * common.double(), gain * rest
        # sum (x + c)(x + c)^T over v rows = sum x x^T + c (sum x + v c)^T + (sum x) c^T
        gram.addr_(c, rest + self.size * c).addr_(rest, c)
        found = by_cholesky(gram, torch.float32)
        if found and _largest_eigenvalue((found.matrix * size[:, None] * size).float()) <= FLOAT32_LIMIT:
            return found
        return None

    def _scaled_(self, gram: torch.Tensor) -> torch.Tensor:
        """A Gram matrix of the head made one of the head with its gain, in place."""
        gain = self.head.gain
        return gram if gain is None else gram.mul_(gain[:, None]).mul_(gain)

    # --- labels -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def labels(self) -> list[str]:
        """The text of each label, decoded with the tokenizer of the folder; ``<5>`` for a row without a token."""
        from seme.semantics.labels import decoded

        return decoded(self.head.folder, self.size)

    # --- cache --------------------------------------------------------------------------------------------------------

    def _from_cache(self, kind: str, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, torch.Tensor], str] | None:
        found = None if self._key is None else storage.load(self._key, kind, shapes)
        return found and ({name: t.to(self.head.device) for name, t in found[0].items()}, found[1])

    def _to_cache(self, kind: str, tensors: dict[str, torch.Tensor], note: str) -> bool:
        return self._key is not None and storage.store(self._key, kind, {k: t.cpu() for k, t in tensors.items()}, note)


def _to_unit_(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to length one, in place, and their lengths in float64."""
    import torch

    norms = torch.linalg.vector_norm(x, dim=1).double()
    odd = (norms < 1e-15) | ~norms.isfinite()  # rows whose squares may not be float32 numbers still have a length
    if bool(odd.any()):
        norms[odd] = torch.linalg.vector_norm(x[odd], dim=1, dtype=torch.float64)
    return x.div_(torch.where(norms > 0, norms, 1.0).to(x.dtype)[:, None]), norms


def add_gram_(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add ``x^T x`` to ``total`` [d, d] float64, on and above the diagonal; what is below it means nothing afterwards.

    Products of x [n, d] are formed in its dtype. In float32 an entry is off by ``n 2^-24 sum_k |x_ki| |x_kj|`` at most,
    in general by about the square root of n times 2^-24.
    """
    half = x.shape[1] // 2
    if x.shape[1] <= BLOCK:
        _add_product_(total, x, x)
        return
    _add_product_(total[:half, half:], x[:, :half], x[:, half:])
    add_gram_(total[:half, :half], x[:, :half])
    add_gram_(total[half:, half:], x[:, half:])


def _add_product_(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    if x.dtype == total.dtype:
        total.addmm_(x.T, y)
    else:
        total += x.T @ y


def mirror_(total: torch.Tensor) -> None:
    """Copy what is above the diagonal below it."""
    for i in range(0, len(total), BLOCK):
        end = i + BLOCK
        square = total[i:end, i:end]
        square.copy_(square.triu() + square.triu(1).T)
        total[end:, i:end] = total[i:end, end:].T


def invert(gram: torch.Tensor, name: str) -> Inverse:
    """The inverse of a Gram matrix by Cholesky, or its pseudo-inverse by eigenvectors; see :data:`CUT`.

    Args:
        gram: [d, d] float64, symmetric, no negative eigenvalue but for rounding.
        name: for messages.

    Raises:
        SemeError: inf or NaN in it, or zero.
    """
    import torch

    if not bool(gram.isfinite().all()):
        raise SemeError(f"{name}: has inf or NaN in it; repair the model")
    found = by_cholesky(gram, gram.dtype)
    if found:
        return found
    values, vectors = torch.linalg.eigh(gram)
    kept = values > CUT * values[-1]
    if not bool(kept.any()):
        raise SemeError(f"{name}: is zero, so it has no semantic bases")
    values, vectors = values[kept], vectors[:, kept]
    matrix = (vectors / values) @ vectors.T
    mirror_(matrix)
    return Inverse(matrix, len(values), float(values[-1]), float(values[0]), "eigh")


def by_cholesky(gram: torch.Tensor, dtype: torch.dtype) -> Inverse | None:
    """The inverse of a Gram matrix; None if it cannot be factorised, or is too close to singular.

    The factorisation is float64. From there on, ``dtype``: float32 is faster, and off by its rounding times the square
    root of the condition.
    """
    import torch

    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(factor.to(dtype)).T  # LAPACK's is by columns
    mirror_(inverse)
    least = _largest_eigenvalue(inverse)
    found = Inverse(inverse.double(), len(gram), _largest_eigenvalue(gram), 1 / least if least else 0.0, "cholesky")
    return found if found.least and found.condition <= CONDITION_LIMIT else None


def _largest_eigenvalue(matrix: torch.Tensor) -> float:
    """Of a symmetric matrix without negative ones; from below, by subspace iteration from a fixed start."""
    import torch

    if not bool(matrix.diagonal().isfinite().all()):
        return float("inf")
    start = torch.randn((len(matrix), min(8, len(matrix))), generator=torch.Generator().manual_seed(0))
    vectors = start.to(matrix)
    for _ in range(6):
        vectors = torch.linalg.qr(matrix @ vectors)[0]
    return float(torch.linalg.eigvalsh(vectors.T @ matrix @ vectors)[-1])
