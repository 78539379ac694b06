"""On a GPU: Triton and CUDA C++ give the bytes of the CPU kernels, for every op, dtype, size and view.

Those with matrix products are within their error bound, and give the same bytes every time.
"""

import pytest
import torch

from seme import dtypes, native
from seme.ops._op import Spec
from seme.ops._registry import MATRIX_OPS, OPS
from tests.kernels.cases import DTYPES, calls, check_bits, make_tensors
from tests.kernels.matrix import check_low, launch, resolved
from tests.ops import matrix_cases, test_matrix

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
BACKENDS = ("triton", "cuda")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cuda" and native.why_not("_C_cuda") is not None:
        pytest.skip(f"seme._C_cuda: {native.why_not('_C_cuda')}")
    return request.param


def compare(name, backend, tensors, arguments, compute):
    op = OPS[name]
    specs = [Spec(tuple(t.shape), dtypes.from_torch(t.dtype)) for t in tensors]
    params = op.check(specs, compute_dtype=compute, **arguments)
    result = op.result(specs, params)
    params.pop("out_dtype", None)
    poison = 0 if op.accumulates else float("nan")
    on_cpu = torch.full(result.shape, poison, dtype=result.dtype.to_torch())
    op.run(tensors, on_cpu, "cpu", 1, dict(params))
    on_gpu = torch.full(result.shape, poison, dtype=result.dtype.to_torch(), device="cuda")
    op.run([t.cuda() for t in tensors], on_gpu, backend, 0, dict(params))
    check_bits(on_gpu.cpu().reshape(-1), on_cpu.reshape(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_bits(name, dtype, backend):
    stored, compute = DTYPES[dtype]
    for numel in (0, 1, 7, 63, 1023, 8191, 8193, 65537, 1_000_003):
        tensors = make_tensors(name, numel, stored)
        for chosen, arguments in calls(name, tensors, compute):
            compare(name, backend, chosen, arguments, compute)


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("name", OPS)
def test_unaligned_views(name, offset, backend):
    op, (stored, compute) = OPS[name], DTYPES["mixed-in-bf16"]
    whole = [t.cuda() for t in make_tensors(name, 20011, stored)]
    views = [t[offset : offset + 20000] for t in whole]
    copies = [v.cpu() for v in views]
    for chosen, arguments in calls(name, copies, compute):
        keywords = {**arguments, "compute_dtype": compute.to_torch()} if name != "nonfinite" else arguments
        found = op(views[: len(chosen)], backend=backend, **keywords)
        check_bits(found.cpu().reshape(-1), op(chosen, backend="cpu", **keywords).reshape(-1))


@pytest.mark.large
@pytest.mark.parametrize("name", OPS)
def test_more_than_two_to_the_31_elements(name, backend):
    """2^31 zeros, and after them elements whose offsets do not fit 32 bits."""
    zeros, more, (stored, compute) = 2**31, 4099, DTYPES["bf16"]
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    tail = make_tensors(name, more, stored)
    tail, arguments = calls(name, tail, compute)[0 if name in ("nonfinite", "magnitude_histogram", "tie_counts") else 1]
    tensors = [torch.zeros(zeros + more, dtype=t.dtype, device="cuda") for t in tail]
    for tensor, end in zip(tensors, tail):
        tensor[zeros:] = end.cuda()
    keywords = {**arguments, "compute_dtype": compute.to_torch()} if name != "nonfinite" else arguments
    found = OPS[name](tensors, backend=backend, **keywords)
    expected = OPS[name](tail, backend="cpu", **keywords)
    if name == "magnitude_histogram":
        expected[:, 0] += zeros
    elif not OPS[name].accumulates:
        before = len(found) - len(expected)  # elements, or blocks
        assert not found[:before].count_nonzero()
        found = found[before:]
    check_bits(found.cpu().reshape(-1), expected.reshape(-1))


# The kernels with matrix products: the bounds of the interpreter's tests, on the tiles that a GPU really gets.

SIZES = ((65, 63, 129), (257, 192, 515), (129, 515, 1031), (1, 1, 1))


def to_gpu(case):
    """The same call on CUDA tensors of the same strides."""

    def moved(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t)

    operands = [[moved(t) for t in o] if isinstance(o, list) else moved(o) for o in case.operands]
    return matrix_cases.Case(case.op, operands, case.arguments)


def run_matrix(case, backend):
    if backend == "cuda" and not case.op.cuda:
        pytest.skip(f"{case.op.name} has no CUDA C++ kernel")
    on_gpu = to_gpu(case)
    first, second = ([t.cpu() for t in on_gpu.run(backend, outs=poisoned(case))] for _ in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "the same call gave other bytes"
    return first


def poisoned(case):
    return [t.cuda() for t in case.outs(0)]


@pytest.mark.parametrize("view", ["rows", "mixed"])
@pytest.mark.parametrize("dtype", matrix_cases.DTYPES)
@pytest.mark.parametrize("name", MATRIX_OPS)
def test_error_bound(name, dtype, view, backend):
    for size in SIZES:
        if name == "resolve":
            case = resolved(size, min(8, size[2]), dtype, view)
        else:
            case = matrix_cases.make(name, dtype, size, view=view)
        # float16 becomes TF32 in Triton, float32 in CUDA C++.
        rounds = dtype == "bf16" or (dtype == "f16" and backend == "triton")
        rounds &= name in ("delta_gram", "delta_project", "project_erase", "elect_select", "elect")
        (check_low if rounds else matrix_cases.check)(case, run_matrix(case, backend))


@pytest.mark.parametrize("experts", [1, 2, 5, 8])
@pytest.mark.parametrize("name", ["project_erase", "elect_select"])
def test_experts(name, experts, backend):
    case = matrix_cases.make(name, "bf16", (129, 192, 257), experts=experts)
    check_low(case, run_matrix(case, backend))


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("name", ["semantic_energy", "weighted_gram"])
def test_precisions_of_float32(name, precision):
    from importlib import import_module

    case = matrix_cases.make(name, "f32", (1, 515, 1031))
    kernel = import_module(f"seme.kernels.{name}").launch
    found = launch(kernel, to_gpu(case), poisoned(case), precision=precision)
    matrix_cases.check(case, [t.cpu() for t in found])


@pytest.mark.parametrize("k", [1, 3, 16, 64])
def test_resolve(k, backend):
    for dtype in ("bf16", "f32", "f64"):
        case = resolved((130, 192, 5001), k, dtype)
        matrix_cases.check(case, run_matrix(case, backend))


def test_elect_is_exact(backend):
    """On integers, counts and energies have one value."""
    base, tensors, bases = ([t.cuda() for t in x] if isinstance(x, list) else x.cuda() for x in test_matrix.exact())
    _, variance = test_matrix.exact_coordinates(base, tensors, bases)
    keys = variance.float().view(torch.int32).long().flatten()
    most = int(keys.mode().values)
    for lowest, shift in ((0, 15), (most - 5, 0), (most + 1, 8)):
        found = MATRIX_OPS["elect_select"](base, tensors, bases, lowest=lowest, shift=shift, backend=backend)
        expected = MATRIX_OPS["elect_select"](base, tensors, bases, lowest=lowest, shift=shift, backend="torch")
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.large
def test_matrix_of_more_than_two_to_the_31_elements():
    """The last rows are those of a call on them alone."""
    rows, width = 2**31 // 4096 + 129, 4096
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    gen = torch.Generator("cuda").manual_seed(0)
    base = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_(generator=gen)
    tensor = torch.empty_like(base).normal_(generator=gen)
    projection = torch.empty(width, width, device="cuda").normal_(generator=gen)
    op, tail = MATRIX_OPS["project_erase"], slice(rows - 129, rows)
    whole = op(base, [tensor], [projection], backend="triton")
    assert torch.equal(whole[tail], op(base[tail], [tensor[tail]], [projection], backend="triton"))
