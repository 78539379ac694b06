"""Resolution: against its definition written out, exact modes, and what is known of the published one."""

import pytest
import torch

from seme import SemanticBases
from seme.errors import SemeError
from seme.semantics import MODES, coefficients, recompose, resolution, round_trip

V, D = 4099, 64  # two tiles of labels; v = 64 d
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=str)
def bases(request):
    """Anisotropic: rows share a mean, columns differ in strength."""
    scale = torch.linspace(1, 1.5, D)
    return SemanticBases.from_head(((normal(V, D) + 0.3) * scale).to(request.param), 1 + normal(D, seed=10) / 20)


def by_definition(r, wg, mode):
    """Coefficients and recomposition in float64, one label after the other."""
    s = torch.linalg.pinv(wg).T
    unit = s / s.norm(dim=1, keepdim=True)
    if mode == "cosine":
        a = torch.stack([unit @ x / x.norm() for x in r])
        return a, sum(a[:, i : i + 1] * unit[i] for i in range(len(wg)))
    if mode == "dual":
        a = r @ unit.T
        b = torch.linalg.pinv(unit).T
        return a, sum(a[:, i : i + 1] * b[i] for i in range(len(wg)))
    a = r @ wg.T
    return a, sum(a[:, i : i + 1] * s[i] for i in range(len(wg)))


@pytest.mark.parametrize("mode", MODES)
def test_coefficients_and_recomposition_are_the_definition(bases, mode):
    r = 7 * normal(5, D, seed=1)
    wg = bases.rows(slice(0, V)).double()
    a, whole = by_definition(r, wg, mode)
    eps = 32 * EPS[bases.dtype] * bases.condition**0.5  # sums of d terms, of S, which has the condition of the head
    found = coefficients(r, bases, mode=mode)
    assert found.dtype == bases.dtype
    torch.testing.assert_close(found.double(), a, rtol=0, atol=eps * float(a.abs().max()))
    for out in (recompose(found, bases, mode=mode), resolution(r, bases, mode)):
        torch.testing.assert_close(out.double(), whole, rtol=0, atol=eps * float(whole.abs().max()))


@pytest.mark.parametrize("mode", MODES)
def test_tiles_add_up(bases, mode):
    r = normal(3, D, seed=2)
    whole = coefficients(r, bases, mode=mode)
    total = torch.zeros(3, D, dtype=bases.dtype)
    for start, stop in ((0, 1), (1, 2048), (2048, V)):
        part = coefficients(r, bases, start, stop, mode)
        assert part.shape == (3, stop - start)
        total += recompose(part, bases, start, mode)
    eps = 8 * EPS[bases.dtype] * bases.condition**0.5
    torch.testing.assert_close(total, recompose(whole, bases, mode=mode), rtol=0, atol=eps * float(total.abs().max()))


@pytest.mark.parametrize("mode", ["dual", "logit"])
def test_exact_modes_give_the_vector_back(bases, mode):
    r = 1e3 * normal(9, D, seed=3)
    eps = 8 * EPS[bases.dtype] * bases.condition**0.5
    torch.testing.assert_close(resolution(r, bases, mode).double(), r, rtol=0, atol=eps * float(r.abs().max()))
    # A cosine differs from 1 by half the square of the error, and by its own rounding.
    assert float((1 - round_trip(r, bases, mode)).abs().max()) <= max(eps**2, 1e-15)


def test_cosine_mode_gives_a_direction(bases):
    r = normal(9, D, seed=4)
    one = resolution(r, bases)
    torch.testing.assert_close(resolution(r * 100, bases), one, rtol=1e-5, atol=1e-6 * float(one.abs().max()))
    long = resolution(r, bases, restore_norm=True).double()
    torch.testing.assert_close(long.norm(dim=1), r.norm(dim=1), rtol=8 * EPS[bases.dtype], atol=0)
    assert torch.equal(round_trip(r, bases) > 0.9, torch.ones(9, dtype=torch.bool))


def test_shapes_zero_vectors_and_dtypes(bases):
    r = torch.zeros(2, 0, D)
    assert round_trip(r, bases).shape == (2, 0)
    r = normal(2, 3, D, seed=5).to(torch.bfloat16)
    r[1, 1] = 0
    assert coefficients(r, bases, 5, 9).shape == (2, 3, 4)
    for mode in MODES:
        assert not coefficients(r, bases, mode=mode)[1, 1].any()
        assert not resolution(r, bases, mode, restore_norm=True)[1, 1].any()
        trip = round_trip(r, bases, mode)
        assert trip.shape == (2, 3)
        assert float(trip[1, 1]) == 0
        assert float(trip.flatten()[[0, 1, 2, 3, 5]].min()) > 0.9
    assert round_trip(r[0, 0], bases).shape == ()


def test_mistakes(bases):
    with pytest.raises(SemeError, match="mode: 'cosin'; expected one of cosine, dual, logit"):
        resolution(torch.ones(D), bases, "cosin")
    with pytest.raises(SemeError, match=r"latent vectors: shape \[2, 65\]; the bases are of width 64"):
        coefficients(torch.ones(2, D + 1), bases)


# --- what is known of the published mode ------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [4, 16, 64])
def test_isotropic_heads_follow_the_law_of_v_over_d(ratio):
    """For a head of independent normal entries the eigenvalues of G are Marchenko-Pastur's. Random directions come
    back with cosine sqrt(1 - d/v) from pseudo-inverse bases and 1 / sqrt(1 + d/v) from the rows themselves: random
    vectors, when there are many, resolve better than pseudo-inverse bases do."""
    d = 128
    head, r = normal(ratio * d, d), normal(2000, d, seed=6)
    pinv = float(round_trip(r, SemanticBases.from_head(head)).mean())
    rows = head / head.norm(dim=1, keepdim=True)
    random = float(torch.nn.functional.cosine_similarity(r, r @ rows.T @ rows, dim=1).mean())
    assert abs(pinv - (1 - 1 / ratio) ** 0.5) < 0.01  # d is finite, rows are not equally long
    assert abs(random - (1 + 1 / ratio) ** -0.5) < 0.01
    assert random > pinv


def test_common_mean_spoils_the_rows_but_not_the_bases():
    head, r = normal(64 * D, D), normal(200, D, seed=7)
    head += head.norm(dim=1).mean() * normal(D, seed=8) / D**0.5
    rows = head / head.norm(dim=1, keepdim=True)
    assert float(torch.nn.functional.cosine_similarity(r, r @ rows.T @ rows, dim=1).mean()) < 0.4
    assert float(round_trip(r, SemanticBases.from_head(head)).mean()) > 0.97


def test_bases_fail_on_vectors_along_strong_directions_of_the_head():
    scale = torch.arange(1, D + 1).double() ** -1
    bases = SemanticBases.from_head(normal(64 * D, D) * scale)
    assert float(round_trip(normal(200, D, seed=9) * scale, bases).mean()) < 0.4
    assert float(round_trip(normal(200, D, seed=9), bases).mean()) > 0.6
    assert float(round_trip(normal(200, D, seed=9) * scale, bases, "dual").min()) > 1 - 1e-12
