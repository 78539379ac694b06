"""Triton and CUDA C++ give the bytes of the CPU kernels, for every element-wise op, dtype, size, view and stream."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from seme import dtypes, native
from seme.errors import BackendError
from seme.ops._op import Spec
from seme.ops._registry import OPS
from tests.kernels.cases import DTYPES, GUARD, calls, check_bits, guarded, make_tensors, output

from .device import DEVICE, chosen, needs_gpu, needs_memory, needs_two

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in the interpreter

# Multiples of 16 are compiled apart from others, and 1 from both.
SIZES = chosen((0, 1, 7, 63, 1023, 8191, 8192, 8193, 65536, 65537, 1_000_003), (1, 63))
SOME = chosen(tuple(DTYPES), ("mixed-in-bf16",))
NAMES = chosen(tuple(OPS), ("weighted_sum", "ties", "magnitude_histogram", "nonfinite"))


def keywords(name, arguments, compute):
    """The arguments of the op, with its compute dtype if it has one."""
    return arguments if name == "nonfinite" else {**arguments, "compute_dtype": compute.to_torch()}


def compare(name, backend, tensors, arguments, compute):
    """The bits of the CPU kernel, into poisoned memory with guards around it."""
    op = OPS[name]
    specs = [Spec(tuple(t.shape), dtypes.from_torch(t.dtype)) for t in tensors]
    params = op.check(specs, compute_dtype=compute, **arguments)
    result = op.result(specs, params)
    params.pop("out_dtype", None)
    on_cpu = torch.zeros(result.shape, dtype=result.dtype.to_torch())
    op.run(tensors, on_cpu, "cpu", 1, dict(params))
    memory = output(op, result).to(DEVICE)
    inside = memory[GUARD:-GUARD].view(result.shape)
    op.run([t.to(DEVICE) for t in tensors], inside, backend, 0, dict(params))
    check_bits(memory.cpu(), guarded(op, on_cpu))


@pytest.mark.parametrize("dtype", SOME)
@pytest.mark.parametrize("name", NAMES)
def test_bits(name, dtype, backend):
    stored, compute = DTYPES[dtype]
    for numel in SIZES:
        tensors = make_tensors(name, numel, stored)
        for some, arguments in calls(name, tensors, compute):
            compare(name, backend, some, arguments, compute)


@pytest.mark.sanitize
@pytest.mark.parametrize("numel", chosen((8193,), (7,)))
@pytest.mark.parametrize("name", NAMES)
def test_memory(name, numel, backend):
    """Short, for compute-sanitizer: ends of blocks, no more and no less."""
    stored, compute = DTYPES["mixed-in-bf16"]
    tensors = make_tensors(name, numel, stored)
    some, arguments = calls(name, tensors, compute)[-1]
    compare(name, backend, some, arguments, compute)


@pytest.mark.parametrize("offset", chosen((1, 2, 3, 5), (3,)))
@pytest.mark.parametrize("name", NAMES)
def test_unaligned_views(name, offset, backend):
    op, (stored, compute) = OPS[name], DTYPES["mixed-in-bf16"]
    numel = chosen(20000, 70)
    whole = [t.to(DEVICE) for t in make_tensors(name, numel + 11, stored)]
    views = [t[offset : offset + numel] for t in whole]
    copies = [v.cpu() for v in views]
    for some, arguments in calls(name, copies, compute):
        given = keywords(name, arguments, compute)
        found = op(views[: len(some)], backend=backend, **given)
        check_bits(found.cpu().reshape(-1), op(some, backend="cpu", **given).reshape(-1))


@pytest.mark.parametrize("name", NAMES)
def test_strided_views(name, backend):
    """Transposed and stepped inputs, and an output that is transposed."""
    op, (stored, compute) = OPS[name], DTYPES["mixed-in-bf16"]
    rows, columns = chosen((300, 70), (9, 8))
    wide = [t.view(columns, rows).to(DEVICE) for t in make_tensors(name, rows * columns, stored)]
    views = [t.t()[1::2, 3:] for t in wide]
    copies = [v.cpu().contiguous() for v in views]
    some, arguments = calls(name, copies, compute)[-1]
    given = keywords(name, arguments, compute)
    expected = op(some, backend="cpu", **given)
    views = views[: len(some)]
    check_bits(op(views, backend=backend, **given).cpu().contiguous(), expected)
    if expected.shape == views[0].shape:
        out = torch.full(expected.shape[::-1], float("nan"), dtype=expected.dtype, device=DEVICE).t()
        op(views, backend=backend, out=out, **given)
        check_bits(out.cpu().contiguous(), expected)


@pytest.mark.parametrize("out_dtype", dtypes.MERGEABLE, ids=str)
def test_output_dtypes(out_dtype, backend):
    """An output of any dtype, in memory that is not aligned."""
    tensors = make_tensors("weighted_sum", chosen(65537, 63), (dtypes.float64,))
    call = {"weights": [1.0, -0.5, 0.3, 2.0], "divisor": 3.0, "compute_dtype": torch.float32}
    expected = torch.empty(tensors[0].shape, dtype=out_dtype.to_torch())
    OPS["weighted_sum"](tensors, out=expected, backend="cpu", **call)
    for offset in (0, 1):
        out = torch.full((len(expected) + offset,), 7.0, dtype=expected.dtype, device=DEVICE)[offset:]
        OPS["weighted_sum"]([t.to(DEVICE) for t in tensors], out=out, backend=backend, **call)
        check_bits(out.cpu(), expected)


def test_in_place(backend):
    for name in ("weighted_sum", "task_vector_sum"):
        tensors = make_tensors(name, chosen(8193, 63), DTYPES["f32"][0])
        _, arguments = calls(name, tensors, DTYPES["f32"][1])[-1]
        expected = OPS[name](tensors, backend="cpu", **arguments)
        on_gpu = [t.to(DEVICE, copy=True) for t in tensors]
        OPS[name](on_gpu, backend=backend, out=on_gpu[1], **arguments)
        check_bits(on_gpu[1].cpu(), expected)


@pytest.mark.parametrize("count", chosen((1, 2, 8, 32), (1, 5)))
def test_many_inputs(count, backend):
    tensors = make_tensors("weighted_sum", chosen(8193, 31), DTYPES["bf16"][0], count)
    weights = [0.1 * i - 0.3 for i in range(count)]
    found = OPS["weighted_sum"]([t.to(DEVICE) for t in tensors], weights=weights, backend=backend)
    check_bits(found.cpu(), OPS["weighted_sum"](tensors, weights=weights, backend="cpu"))


def test_calls_that_nobody_waits_for(backend):
    """The numbers of a call go to the GPU through memory that is used again: not before it has been read."""
    tensors = make_tensors("ties", chosen(1 << 20, 63), DTYPES["bf16"][0])
    _, arguments = calls("ties", tensors, DTYPES["bf16"][1])[1]
    on_gpu = [t.to(DEVICE) for t in tensors]
    given = [{**arguments, "scale": 0.01 * i, "weights": [0.1 * i, 1.0, -0.2]} for i in range(chosen(40, 3))]
    found = [OPS["ties"](on_gpu, backend=backend, **g) for g in given]
    for one, g in zip(found, given):
        check_bits(one.cpu(), OPS["ties"](tensors, backend="cpu", **g))


@needs_gpu
@pytest.mark.parametrize("name", OPS)
def test_on_another_stream(name, backend):
    """Kernels run on the current stream: behind what makes their inputs, which here takes a while."""
    stored, compute = DTYPES["bf16"]
    tensors = make_tensors(name, 65537, stored)
    some, arguments = calls(name, tensors, compute)[-1]
    given = keywords(name, arguments, compute)
    expected = OPS[name](some, backend="cpu", **given)
    OPS[name]([t.cuda() for t in some], backend=backend, **given)  # compiled
    stream = torch.cuda.Stream()
    sources = [t.cuda() for t in some]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        targets = [torch.full_like(t, 3.0) for t in sources]
        torch.cuda._sleep(100_000_000)
        for target, source in zip(targets, sources):
            target.copy_(source)
        found = OPS[name](targets, backend=backend, **given)
    stream.synchronize()
    check_bits(found.cpu().reshape(-1), expected.reshape(-1))


@needs_gpu
def test_from_many_threads(backend, tmp_path, monkeypatch):
    """As the workers of a merge do: each on a stream of its own, all at once, with kernels that nobody compiled yet."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    stored, compute = (dtypes.float16, dtypes.float64, dtypes.bfloat16), dtypes.float32  # in no other test
    work = []
    for name in OPS:
        some, arguments = calls(name, make_tensors(name, 39_999, stored), compute)[-1]
        given = keywords(name, arguments, compute)
        work.append((name, some, given, OPS[name](some, backend="cpu", **given)))

    def run(number):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for name, some, given, expected in work[number % len(work) :] + work[: number % len(work)]:
                found = OPS[name]([t.cuda() for t in some], backend=backend, **given).cpu()
                check_bits(found.reshape(-1), expected.reshape(-1))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(run, i) for i in range(16)]:
            done.result()


@needs_two
@pytest.mark.parametrize("name", OPS)
def test_on_another_gpu(name, backend):
    """On the device of the tensors, whichever is the current one."""
    stored, compute = DTYPES["bf16"]
    some, arguments = calls(name, make_tensors(name, 8193, stored), compute)[-1]
    given = keywords(name, arguments, compute)
    found = OPS[name]([t.to("cuda:1") for t in some], backend=backend, **given)
    assert found.device == torch.device("cuda:1")
    check_bits(found.cpu().reshape(-1), OPS[name](some, backend="cpu", **given).reshape(-1))


@pytest.mark.large
@pytest.mark.parametrize("name", chosen(tuple(OPS), (*NAMES[1:], "inner_products")))
def test_more_than_two_to_the_31_elements(name, backend):
    """Zeros, and after them elements whose offsets do not fit 32 bits: 13 GB at most."""
    zeros, more, (stored, compute) = chosen(2**31, 2**13), chosen(4099, 63), DTYPES["bf16"]
    needs_memory(24)
    tail = make_tensors(name, more, stored, count=2)
    tail, arguments = calls(name, tail, compute)[0 if name in ("nonfinite", "magnitude_histogram", "tie_counts") else 1]
    tensors = [torch.zeros(zeros + more, dtype=t.dtype, device=DEVICE) for t in tail]
    for tensor, end in zip(tensors, tail):
        tensor[zeros:] = end.to(DEVICE)
    given = keywords(name, arguments, compute)
    found = OPS[name](tensors, backend=backend, **given)
    del tensors, tensor
    expected = OPS[name](tail, backend="cpu", **given)
    if name == "magnitude_histogram":
        expected[:, 0] += zeros
    elif not OPS[name].accumulates:
        before = len(found) - len(expected)  # elements, or blocks
        assert before == (zeros // native.BLOCK if OPS[name].ordered else zeros)
        assert not found[:before].count_nonzero()
        found = found[before:]
    check_bits(found.cpu().reshape(-1), expected.reshape(-1))


def test_without_the_cuda_module(monkeypatch):
    """Triton alone: auto finds it, and asking for the other says what is missing."""
    monkeypatch.setitem(native._loaded, "_C_cuda", "not built")
    tensors = make_tensors("weighted_sum", 63, DTYPES["bf16"][0])
    on_gpu = [t.to(DEVICE) for t in tensors]
    expected = OPS["weighted_sum"](tensors, weights=[1.0] * 4, backend="cpu")
    check_bits(OPS["weighted_sum"](on_gpu, weights=[1.0] * 4, backend="auto").cpu(), expected)
    with pytest.raises(BackendError, match=chosen("not built", "works on CUDA tensors")):
        OPS["weighted_sum"](on_gpu, weights=[1.0] * 4, backend="cuda")
