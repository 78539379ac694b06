"""The CUDA C++ kernels of elect and resolve, compiled for the CPU by an emulator: within the bound of the matrix ops.

So their tiles, masks, barriers, the layout of the tensor cores' operands and the running lists are tested where there
is no GPU. ``test_cuda_build.py`` compiles them for GPUs.
"""

import pytest
import torch

from seme.ops import _matrix, _op, cuda
from seme.ops._registry import MATRIX_OPS
from tests.ops import matrix_cases, test_matrix
from tests.ops.matrix_cases import BF16, EMPTY, F64, Case, make

from .matrix import check_low, launch, resolved

NAMES = ("elect_select", "elect", "resolve")
SMALL = (7, 63, 65)


@pytest.fixture(autouse=True)
def _calls_reach_the_kernels(emulated, monkeypatch):
    """The backend cuda, on CPU tensors; the labels are searched in several ranges."""
    monkeypatch.setattr(_matrix, "choose_backend", lambda backend, device: backend)
    monkeypatch.setattr(_op, "choose_backend", lambda backend, device: backend)
    resolve = cuda.resolve
    monkeypatch.setattr(cuda, "resolve", lambda *a, **k: resolve(*a, **{"ranges": 3, **k}))


def run(case, outs=None, **options):
    return launch(getattr(cuda, case.op.name), case, outs, **options)


@pytest.mark.parametrize("name", NAMES)
def test_error_bound(name):
    """float32 and float64 operands; the scalar units take float16 as well."""
    cases = [("f32", (65, 33, 70), "rows"), ("f32", (1, 1, 1), "rows"), ("f64", SMALL, "mixed")]
    cases += [("f16", SMALL, "columns"), ("mixed", SMALL, "mixed"), ("mixed-f64", SMALL, "rows")]
    cases += [("f32", size, "rows") for size in EMPTY if name != "resolve" or size[2] > 0]
    for dtype, size, view in cases:
        case = resolved(size, min(5, size[2]), dtype, view) if name == "resolve" else make(name, dtype, size, view=view)
        matrix_cases.check(case, run(case))


@pytest.mark.parametrize("name", ["elect_select", "elect"])
@pytest.mark.parametrize("view", ["rows", "mixed"])
def test_tensor_cores(name, view):
    case = make(name, "bf16", (65, 40, 70), view=view)
    check_low(case, run(case))
    case = make(name, "bf16", (63, 49, 64), experts=6 if name == "elect_select" else 3)
    check_low(case, run(case))


@pytest.mark.parametrize(("experts", "dtype"), [(4, BF16), (2, F64)])
def test_elections_that_are_exact(experts, dtype):
    test_matrix.test_counts_and_energies_are_exact("cuda", experts, dtype)


def test_the_threshold_is_exact():
    test_matrix.test_two_calls_find_the_exact_threshold("cuda")


def test_election_by_hand():
    test_matrix.test_election_by_hand("cuda")


def test_elect_in_parts():
    case = make("elect", "bf16", (130, 33, 70), view="mixed")
    whole, parts = run(case)[0], run(case, workspace=1)[0]
    assert torch.equal(whole, parts)


def test_the_greatest_energy():
    """Of a task vector that is a multiple of the only basis; and none without a task vector or with one that is inf."""
    basis = torch.nn.functional.normalize(torch.arange(1.0, 9.0), dim=0)[None]
    zero = torch.zeros_like(basis)
    for tensor, expected in ((3e9 * basis, 9e18), (zero, 0.0), (zero + float("inf"), float("nan"))):
        op = MATRIX_OPS["elect_select"]
        _, energies = run(Case(op, [zero, [tensor, zero], basis], {"lowest": 0, "shift": 15}))
        assert torch.isclose(energies[0].sum(), torch.tensor(expected).double(), rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("k", [1, 5, 33, 64])
@pytest.mark.parametrize("ranges", [1, 3])
def test_resolve(k, ranges):
    case = resolved((9, 40, 300), k)
    matrix_cases.check(case, run(case, ranges=ranges))


def test_resolve_of_close_and_dependent_bases():
    test_matrix.test_residual_is_orthogonal_on_close_bases("cuda")
    test_matrix.test_dependent_and_zero_bases_get_nothing("cuda")
    test_matrix.test_nonfinite_vectors_end("cuda")


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_any_layout(name):
    test_matrix.test_outputs_of_any_layout(name, "cuda")


def test_results_are_added_to_out():
    test_matrix.test_results_are_added_to_out("elect_select", "cuda")


def test_wrong_calls_are_refused(emulated):
    case = make("elect_select", "bf16", (3, 4, 5), experts=9)
    with pytest.raises(ValueError, match="at most 8 experts, got 9; use the backend triton"):
        run(case)
    view, stream = (64, 12, 2), (0, 0)
    with pytest.raises(ValueError, match="elements of a tensor: 20 expected, got 12"):
        emulated.squared_norms([view, view], (4, 5, 6), view, stream)
    with pytest.raises(ValueError, match="elements of bases: 24 expected, got 12"):
        emulated.resolve_select(view, view, (3, 4, 6), 1, 1, view, stream)
    with pytest.raises(ValueError, match="k is 1 to 64, and at most the labels"):
        emulated.resolve_select(view, view, (3, 4, 3), 4, 1, view, stream)
    with pytest.raises(ValueError, match="pitch is smaller"):
        emulated.elect_combine([view, view], view, (3, 4, 3), 0, [1.0], (64, 6, 2), 2, stream)
    with pytest.raises(ValueError, match="negative size"):
        emulated.resolve_erase(view, view, (-3, 4, 3), view, 1, 0.0, view, view, stream)
