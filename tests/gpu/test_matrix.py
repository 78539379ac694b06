"""The kernels with matrix products are within their error bound, on the tiles of a GPU, and repeat their bytes."""

from importlib import import_module

import pytest
import torch

from seme import SemanticBases
from seme.ops._registry import MATRIX_OPS
from tests.kernels.matrix import check_low, launch, resolved
from tests.ops import matrix_cases, test_matrix

from .device import DEVICE, GPU, chosen, needs_gpu, needs_memory

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in the interpreter

SIZES = chosen(((65, 63, 129), (257, 192, 515), (129, 515, 1031), (256, 256, 512), (1, 1, 1)), ((3, 17, 9),))
SOME = chosen(tuple(matrix_cases.DTYPES), ("bf16", "mixed"))
NAMES = chosen(tuple(MATRIX_OPS), ("delta_gram", "semantic_energy", "elect", "resolve"))
ROUNDED = ("delta_gram", "delta_project", "project_erase", "elect_select", "elect")


def on_device(case):
    """The same call on the device, with the same strides."""

    def moved(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE).copy_(t)

    operands = [[moved(t) for t in o] if isinstance(o, list) else moved(o) for o in case.operands]
    return matrix_cases.Case(case.op, operands, case.arguments)


def poisoned(case):
    return [t.to(DEVICE) for t in case.outs(0)]


def run(case, backend):
    """Twice: the second time with the same bytes."""
    if backend == "cuda" and not case.op.cuda:
        pytest.skip(f"{case.op.name} has no CUDA C++ kernel")
    moved = on_device(case)
    first, second = ([t.cpu() for t in moved.run(backend, outs=poisoned(case))] for _ in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "the same call gave other bytes"
    return first


@pytest.mark.parametrize("view", chosen(("rows", "mixed"), ("mixed",)))
@pytest.mark.parametrize("dtype", SOME)
@pytest.mark.parametrize("name", NAMES)
def test_error_bound(name, dtype, view, backend):
    for size in SIZES:
        if name == "resolve":
            case = resolved(size, min(8, size[2]), dtype, view)
        else:
            case = matrix_cases.make(name, dtype, size, view=view)
        # float16 becomes TF32 in Triton, float32 in CUDA C++.
        rounds = dtype == "bf16" or (dtype == "f16" and backend == "triton")
        (check_low if rounds and name in ROUNDED else matrix_cases.check)(case, run(case, backend))


@pytest.mark.sanitize
@pytest.mark.parametrize("name", NAMES)
def test_memory(name, backend):
    """Short, for compute-sanitizer: a little more than whole tiles."""
    size = chosen((65, 63, 129), (2, 5, 7))
    case = resolved(size, 5) if name == "resolve" else matrix_cases.make(name, "bf16", size, view="mixed")
    (check_low if name in ROUNDED else matrix_cases.check)(case, run(case, backend))


@pytest.mark.parametrize("name", NAMES)
def test_empty(name, backend):
    for size in matrix_cases.EMPTY:
        if name != "resolve" or size[2] > 0:
            case = matrix_cases.make(name, "f32", size)
            matrix_cases.check(case, run(case, backend))


@pytest.mark.parametrize("experts", chosen((1, 2, 5, 8), (2,)))
@pytest.mark.parametrize("name", ["project_erase", "elect_select"])
def test_experts(name, experts, backend):
    case = matrix_cases.make(name, "bf16", chosen((129, 192, 257), (5, 9, 11)), experts=experts)
    check_low(case, run(case, backend))


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("name", ["semantic_energy", "weighted_gram"])
def test_precisions_of_float32(name, precision):
    case = matrix_cases.make(name, "f32", chosen((1, 515, 1031), (1, 17, 31)))
    kernel = import_module(f"seme.kernels.{name}").launch
    found = launch(kernel, on_device(case), poisoned(case), precision=precision)
    matrix_cases.check(case, [t.cpu() for t in found])


@pytest.mark.parametrize("k", chosen((1, 3, 16, 64), (3,)))
def test_resolve(k, backend):
    for dtype in chosen(("bf16", "f32", "f64"), ("bf16",)):
        case = resolved(chosen((130, 192, 5001), (2, 9, 40)), k, dtype)
        matrix_cases.check(case, run(case, backend))


def test_nearest_labels_alone(backend):
    """The first half of resolve gives the labels that the whole does."""
    case = on_device(resolved(chosen((130, 192, 5001), (2, 9, 40)), 8))
    vectors, bases = case.operands
    module = import_module("seme.kernels.resolve" if backend == "triton" else "seme.ops.cuda")
    labels, _, _ = case.op(vectors, bases, k=8, backend=backend)
    assert torch.equal(module.nearest(vectors, bases, 8), labels)


def test_elect_is_exact(backend):
    """On integers, counts and energies have one value."""
    base, tensors, bases = ([t.to(DEVICE) for t in x] if isinstance(x, list) else x.to(DEVICE) for x in exact())
    _, variance = test_matrix.exact_coordinates(base, tensors, bases)
    keys = variance.float().view(torch.int32).long().flatten()
    most = int(keys.mode().values)
    for lowest, shift in chosen(((0, 15), (most - 5, 0), (most + 1, 8)), ((most - 5, 0),)):
        found = MATRIX_OPS["elect_select"](base, tensors, bases, lowest=lowest, shift=shift, backend=backend)
        expected = MATRIX_OPS["elect_select"](base, tensors, bases, lowest=lowest, shift=shift, backend="torch")
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def exact():
    """Integers; a few rows and labels of them on the CPU."""
    base, tensors, bases = test_matrix.exact()
    return (base, tensors, bases) if GPU else (base[:8], [t[:8] for t in tensors], bases[:16])


@needs_gpu
@pytest.mark.parametrize("name", MATRIX_OPS)
def test_on_another_stream(name, backend):
    """Kernels run on the current stream: behind what makes their operands, which here takes a while."""
    case = resolved((65, 63, 129), 5) if name == "resolve" else matrix_cases.make(name, "bf16", (65, 63, 129))
    expected = run(case, backend)
    sources = on_device(case)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = [
            [torch.zeros_like(t) for t in o] if isinstance(o, list) else torch.zeros_like(o) for o in sources.operands
        ]
        outs = poisoned(case)
        torch.cuda._sleep(100_000_000)
        for target, source in zip(late, sources.operands):
            for a, b in zip(*((x if isinstance(x, list) else [x]) for x in (target, source))):
                a.copy_(b)
        found = matrix_cases.Case(case.op, late, case.arguments).run(backend, outs=outs)
    stream.synchronize()
    for a, b in zip(found, expected):
        assert torch.equal(a.cpu(), b)


@pytest.mark.large
def test_more_than_two_to_the_31_elements():
    """The last rows are those of a call on them alone. Three matrices of 4 GB."""
    tail = chosen(129, 3)
    rows, width = chosen((2**31 // 4096 + tail, 4096), (20 + tail, 16))
    needs_memory(24)
    gen = torch.Generator(DEVICE).manual_seed(0)
    base = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE).normal_(generator=gen)
    tensor = torch.empty_like(base).normal_(generator=gen)
    projection = torch.empty(width, width, device=DEVICE).normal_(generator=gen)
    op, last = MATRIX_OPS["project_erase"], slice(rows - tail, rows)
    whole = op(base, [tensor], [projection], backend="triton")
    # The tiles of rows begin elsewhere, but a sum has the same terms in the same order.
    assert torch.equal(whole[last], op(base[last], [tensor[last]], [projection], backend="triton"))


# The bases of a head.


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_bases(dtype, gain):
    """Unit bases and dual frame of a head on the device, against float64 by another way: a pseudo-inverse."""
    labels, width = chosen((1031, 96), (61, 12))
    gen = torch.Generator().manual_seed(0)
    head = torch.randn(labels, width, generator=gen).to(dtype)
    scale = torch.rand(width, generator=gen) + 0.5 if gain else None
    bases = SemanticBases.from_head(head.to(DEVICE), None if scale is None else scale.to(DEVICE))
    weighted = head.double() if scale is None else head.double() * scale.double()
    exact = torch.nn.functional.normalize(torch.linalg.pinv(weighted).T, dim=1)
    found = bases.matrix()
    assert found.device.type == DEVICE
    # Rounding of the bases' dtype times the condition of the head, which is below 4.
    limit = 64 * torch.finfo(found.dtype).eps
    assert (found.cpu().double() - exact).norm(dim=1).max() < limit
    frame = torch.linalg.pinv(exact).T
    assert (bases.dual().cpu().double() - frame).norm() / frame.norm() < limit
