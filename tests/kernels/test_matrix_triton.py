"""The matrix kernels in Triton's interpreter: within the error bound, exact where every sum is, on any layout.

A program costs the interpreter a tenth of a second, whatever its size; so matrices are small and tiles are large, but
for one case of each kernel that has several tiles in every axis.
"""

import importlib
import importlib.util
import os

import pytest
import torch

from seme.ops._registry import MATRIX_OPS
from tests.ops import matrix_cases, test_matrix
from tests.ops.matrix_cases import BF16, EMPTY, F64, Case, make

from .matrix import check_low, launch, resolved

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiled here: tests/gpu runs the kernels"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NumPy, on inf and NaN
]
NAMES = list(MATRIX_OPS)
ROUNDED = ("delta_gram", "delta_project", "project_erase", "elect_select", "elect")
SYMMETRIC = ("delta_gram", "weighted_gram")
TILED = (129, 130, 131)  # a little more than whole tiles
SMALL = (7, 63, 65)


def shape(m=128, n=128, k=64):
    from seme.kernels.tables import Tiles

    return Tiles(m, n, k, 4, 2)


def run(case, outs=None, **options):
    kernel = importlib.import_module(f"seme.kernels.{case.op.name}").launch
    return launch(kernel, case, outs, **{"shape": shape(), **options})


@pytest.fixture
def large_tiles(monkeypatch):
    """For calls through the ops."""
    for name in NAMES:
        monkeypatch.setattr(importlib.import_module(f"seme.kernels.{name}"), "tiles", lambda *a, **k: shape())


def made(name, dtype, size, view="rows"):
    return resolved(size, min(5, size[2]), dtype, view) if name == "resolve" else make(name, dtype, size, view=view)


@pytest.mark.parametrize("name", NAMES)
def test_error_bound(name):
    """Operands that are not rounded: float32 and float64, alone and beside others."""
    cases = [("f32", TILED, "rows"), ("f32", (1, 1, 1), "rows"), ("f32", SMALL, "columns"), ("f64", SMALL, "mixed")]
    cases += [("mixed", SMALL, "mixed"), ("mixed-f64", SMALL, "rows")]
    cases += [("f32", size, "rows") for size in EMPTY if name != "resolve" or size[2] > 0]
    for dtype, size, view in cases:
        # A vector is a program.
        case = made(name, dtype, (min(size[0], 3), *size[1:]) if name == "resolve" else size, view)
        matrix_cases.check(case, run(case))


@pytest.mark.parametrize(("dtype", "size", "view"), [("bf16", TILED, "rows"), ("f16", SMALL, "mixed")])
@pytest.mark.parametrize("name", ROUNDED)
def test_error_bound_of_rounded_operands(name, dtype, size, view):
    case = make(name, dtype, size, view=view)
    check_low(case, run(case))


@pytest.mark.parametrize("name", ["semantic_energy", "weighted_gram", "resolve"])
def test_bfloat16_bases(name):
    """bfloat16 operands are exact; a weight is not rounded to them."""
    case = made(name, "bf16", SMALL)
    for at, operand in enumerate(case.operands):
        if operand.dim() == 2:
            case.operands[at] = operand.to(BF16)
    matrix_cases.check(case, run(case))


@pytest.mark.parametrize("name", ["semantic_energy", "weighted_gram"])
def test_three_products_of_tf32(name):
    """An option that the interpreter computes in float32; that it compiles is the other test's."""
    case = make(name, "f32", SMALL)
    matrix_cases.check(case, run(case, precision="tf32x3"))


@pytest.mark.parametrize("name", ["semantic_energy", "resolve"])
def test_float64_without_its_product(name, monkeypatch):
    """As Triton 3.4 needs it."""
    import triton.language as tl
    from seme.kernels import numeric, tables

    for module in (numeric, importlib.import_module("seme.kernels.resolve")):
        monkeypatch.setattr(module, "DOT_TAKES_FLOAT64", tl.constexpr(False))
    monkeypatch.setattr(tl, "dot", None)
    monkeypatch.setattr(tl.core, "dot", None)
    case = made(name, "f64", (3, 63, 65))
    matrix_cases.check(case, run(case, shape=tables.for_triton(shape(), "float64")))


@pytest.mark.parametrize("name", SYMMETRIC)
def test_halves(name):
    """Symmetric to the bit; without `mirror` nothing is written below the diagonal."""
    case = make(name, "f32", (65, 150, 70))
    (whole,) = run(case)
    assert torch.equal(whole, whole.T)
    half = Case(case.op, case.operands, {"mirror": False})
    (upper,) = run(half, [torch.full_like(whole, 3.0)])
    assert torch.equal(upper.tril(-1), torch.full_like(whole, 3.0).tril(-1))
    matrix_cases.check(case, [upper.triu() + upper.triu(1).T], start=3)


def test_pairs_of_tiles(tmp_path, monkeypatch):
    """Every pair i <= j once."""
    (tmp_path / "list_pairs.py").write_text(
        "import triton\n"
        "import triton.language as tl\n"
        "from seme.kernels.tiles import upper_pair\n\n\n"
        "@triton.jit\n"
        "def list_pairs(out, count):\n"
        "    i, j = upper_pair(tl.program_id(0), count)\n"
        "    tl.store(out + tl.program_id(0), i * 100 + j)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    list_pairs = importlib.import_module("list_pairs").list_pairs
    for tiles in range(1, 10):
        number = tiles * (tiles + 1) // 2
        out = torch.zeros(number, dtype=torch.int32)
        list_pairs[(number,)](out, tiles)
        assert sorted(out.tolist()) == [i * 100 + j for i in range(tiles) for j in range(i, tiles)]


def test_results_are_added_to_out():
    for name in test_matrix.ACCUMULATING:
        case = make(name, "f32", SMALL)
        matrix_cases.check(case, run(case, case.outs(3)), start=3)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_any_layout(name):
    """Results go into transposed and stepped memory, and around them nothing is written."""
    case = made(name, "f32", (6, 17, 40))
    expected = run(case)
    for turn in (True, False):
        memory, outs = [], []
        for out, start in zip(expected, case.outs(0)):
            if turn and out.dim() == 2:
                memory.append(torch.full((out.shape[1] + 3, out.shape[0]), -7, dtype=out.dtype))
                outs.append(memory[-1][1 : out.shape[1] + 1].T)
            else:
                memory.append(torch.full((*out.shape[:-1], 2 * out.shape[-1] + 3), -7, dtype=out.dtype))
                outs.append(memory[-1][..., 1 : 2 * out.shape[-1] : 2])
            outs[-1].copy_(start)
        run(case, outs)
        for out, value, whole in zip(outs, expected, memory):
            assert torch.equal(out, value)
            assert int((whole == -7).sum()) == whole.numel() - out.numel()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounded_once(out_dtype):
    """A result in a narrower dtype is the float32 one, rounded."""
    for name in ("project_erase", "elect"):
        case = make(name, "f32", SMALL)
        (exact,) = run(case)
        (found,) = run(case, [torch.full_like(exact, float("nan"), dtype=out_dtype)])
        assert torch.equal(found, exact.to(out_dtype))


# elect


@pytest.mark.parametrize(("experts", "dtype"), [(4, BF16), (2, F64)])
@pytest.mark.usefixtures("large_tiles")
def test_counts_and_energies_are_exact(experts, dtype):
    test_matrix.test_counts_and_energies_are_exact("triton", experts, dtype)


@pytest.mark.usefixtures("large_tiles")
def test_elections_by_hand():
    test_matrix.test_election_by_hand("triton")
    test_matrix.test_two_calls_find_the_exact_threshold("triton")


def test_elect_in_parts():
    """A workspace of one block of rows gives the bits of one that holds all."""
    case = make("elect", "bf16", (130, 33, 70), view="mixed")
    whole, parts = run(case)[0], run(case, workspace=1)[0]
    assert torch.equal(whole, parts)


def test_energies_of_any_size():
    """The fixed point follows the size of the task vectors; without any, nothing is divided by zero."""
    case = make("elect_select", "f32", SMALL)
    base, tensors, bases = case.operands
    for factor in (1e-18, 1e12):
        scaled = [t * factor for t in tensors]
        _, energies = run(Case(case.op, [torch.zeros_like(base), scaled, bases], case.arguments))
        expected = matrix_cases.coordinates(0, [t.double() for t in scaled], bases.double()).square().sum((1, 2))
        assert (energies.sum(1) / expected - 1).abs().max() < 1e-6
    counts, energies = run(Case(case.op, [base, [base, base], bases], case.arguments))
    assert counts[0] == 7 * 65
    assert not energies.any()
    # The greatest sum there is, of a task vector that is a multiple of the only basis.
    along = [base[:1] * 0, [3 * bases[:1], base[:1] * 0], bases[:1]]
    _, energies = run(Case(case.op, along, case.arguments))
    assert abs(energies[0].sum() / (9 * bases[0].double().square().sum() ** 2) - 1) < 1e-6
    unbounded = run(Case(case.op, [base, [base + float("inf"), base], bases], case.arguments))[1]
    assert unbounded[0].isnan().all()


# resolve


@pytest.mark.parametrize(("k", "ranges"), [(1, 3), (2, 1), (5, 3), (16, 1), (64, 3)])
def test_resolve(k, ranges):
    """Lists of any length, over several label tiles and ranges."""
    case = resolved((2, 48, 300), k, "bf16")
    matrix_cases.check(case, run(case, shape=shape(16, 128, 64), ranges=ranges))


def test_close_bases():
    """The Gram matrix of bases within a few degrees of one another has lost half of the digits of float32."""
    gen = torch.Generator().manual_seed(3)
    center = torch.randn(1, 48, generator=gen)
    bases = torch.nn.functional.normalize(center + 0.1 * torch.randn(64, 48, generator=gen), dim=1)
    case = Case(MATRIX_OPS["resolve"], [center + torch.randn(2, 48, generator=gen), bases], {"k": 24})
    labels, _, residual = found = run(case)
    matrix_cases.check(case, found)
    leak = torch.einsum("nkd,nd->nk", bases[labels].double(), residual.double()).abs().max()
    assert leak < 1e-6 * case.operands[0].norm(dim=1).max()  # what rounding the residual to float32 leaves


@pytest.mark.usefixtures("large_tiles")
def test_dependent_bases_and_numbers_that_are_none():
    test_matrix.test_dependent_and_zero_bases_get_nothing("triton")
    test_matrix.test_nonfinite_vectors_end("triton")


@pytest.mark.parametrize("k", [2, 31])
def test_ties_go_to_the_lowest_label(k):
    """Exact scores with many ties and both signs, over more labels than a tile has."""
    gen = torch.Generator().manual_seed(2)
    vectors = torch.randint(-2, 3, (2, 6), generator=gen).float()
    vectors[1] = 0  # all scores are 0
    bases = torch.randint(-1, 2, (1000, 6), generator=gen).float()
    labels, _, _ = run(Case(MATRIX_OPS["resolve"], [vectors, bases], {"k": k}), shape=shape(16, 256, 64), ranges=2)
    assert torch.equal(labels, (vectors @ bases.T).abs().argsort(dim=1, descending=True, stable=True)[:, :k])


def test_default_tiles():
    """As the ops call the kernels, whose tiles are those of a GPU; many experts make them smaller."""
    from seme.kernels.tables import TILES, shrink

    for name in NAMES:
        case = make(name, "f32", (9, 40, 30))
        matrix_cases.check(case, case.run("triton"))
    for results in (1, 2, 3, 8, 64):
        for by_operand in TILES.values():
            for chosen in by_operand.values():
                small = shrink(chosen, results)
                assert min(small.m, small.n) >= 16
                assert results * small.m * small.n <= max(chosen.m * chosen.n, results * 256)
