"""On a GPU: Triton and CUDA C++ give the bytes of the CPU kernels, for every op, dtype, size and view."""

import pytest
import torch

from seme import dtypes, native
from seme.ops._op import Spec
from seme.ops._registry import OPS
from tests.kernels.cases import DTYPES, calls, check_bits, make_tensors

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
