"""The C++ kernels give the bits of the torch reference: any instruction set, threads, chunks, dtypes, sizes, views."""

import pytest
import torch

from seme import dtypes, native
from seme.native import BLOCK
from seme.ops._op import Spec, view
from seme.ops._registry import OPS
from seme.ops._task_vectors import UNLIMITED
from tests.kernels.cases import DTYPES, calls, check_bits, compare, make_tensors

pytestmark = pytest.mark.skipif(native.why_not("_C") is not None, reason="seme._C is not built: SEME_NATIVE=1")
ISAS = ("baseline", "avx2", "avx512")
INT64 = dtypes.BY_NAME["int64"]


@pytest.fixture(params=ISAS)
def isa(request):
    module = native.module()
    number = ISAS.index(request.param)
    if number > module.best_isa():
        pytest.skip(f"this machine has no {request.param}")
    module.set_isa(number)
    yield request.param
    module.set_isa(module.best_isa())


def launch(name, threads):
    op = OPS[name]

    def run(tensors, out, **params):
        dtype = INT64 if out.dtype == torch.int64 else dtypes.from_torch(out.dtype)
        op.native([view(t) for t in tensors], native.View(out.data_ptr(), out.numel(), dtype), threads, **params)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_bits(name, dtype, isa):
    stored, compute = DTYPES[dtype]
    for numel in (0, 1, 7, 63, 1023, 8191, 8193):
        tensors = make_tensors(name, numel, stored)
        for chosen, arguments in calls(name, tensors, compute):
            compare(launch(name, 1), name, chosen, arguments, compute)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", ["bf16-in-f32", "f64"])
@pytest.mark.parametrize("name", OPS)
def test_threads(name, dtype, threads):
    stored, compute = DTYPES[dtype]
    tensors = make_tensors(name, 16 * BLOCK + 65, stored)
    for chosen, arguments in calls(name, tensors, compute):
        compare(launch(name, threads), name, chosen, arguments, compute)


@pytest.mark.parametrize("threads", [2, 3])
def test_histogram_threads(threads):
    """Threads get histograms of their own only when there is much to count."""
    stored, compute = DTYPES["bf16-in-f32"]
    tensors = make_tensors("magnitude_histogram", 96 * BLOCK + 65, stored, count=2)
    for chosen, arguments in calls("magnitude_histogram", tensors, compute):
        compare(launch("magnitude_histogram", threads), "magnitude_histogram", chosen, arguments, compute)


@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("name", OPS)
def test_unaligned_views(name, offset):
    stored, compute = DTYPES["mixed-in-bf16"]
    tensors = [t[offset : offset + 1500] for t in make_tensors(name, 1600, stored)]
    for chosen, arguments in calls(name, tensors, compute):
        compare(launch(name, 1), name, chosen, arguments, compute)


@pytest.mark.parametrize("dtype", ["bf16-in-f32", "f32"])
@pytest.mark.parametrize("name", OPS)
def test_chunks(name, dtype):
    """A tensor in chunks of whole blocks, with quotas and offsets handed on, gives what it gives at once."""
    op, (stored, compute) = OPS[name], DTYPES[dtype]
    tensors = make_tensors(name, 5 * BLOCK + 77, stored)
    for chosen, arguments in calls(name, tensors, compute):
        specs = [Spec(tuple(t.shape), dtypes.from_torch(t.dtype)) for t in chosen]
        params = op.check(specs, compute_dtype=compute, **arguments)
        result = op.result(specs, params)
        params.pop("out_dtype", None)
        whole = torch.zeros(result.shape, dtype=result.dtype.to_torch())
        op.run(chosen, whole, "cpu", 1, dict(params))
        parts, quantum = [], op.quantum(params)
        step = max(quantum, 2 * BLOCK // quantum * quantum)
        for start in range(0, chosen[0].numel(), step):
            piece = [t[start : start + step] for t in chosen]
            if op.accumulates:
                out = parts[0] if parts else torch.zeros_like(whole)
                parts = [out]
            else:
                shape = (-(-piece[0].numel() // quantum), *result.shape[1:]) if op.ordered else piece[0].shape
                out = torch.full(shape, float("nan"), dtype=whole.dtype)
                parts.append(out)
            op.run(piece, out, "cpu", 1, dict(params))
            if op.positional:
                params["offset"] += piece[0].numel()
            if params.get("tie_quotas"):
                used = torch.zeros(len(params["tie_quotas"]), dtype=torch.int64)
                count = OPS["variance_ties" if name in ("sce", "selected_squares") else "tie_counts"]
                counting = {"thresholds": params["thresholds"], "compute_dtype": compute}
                count.run(piece, used, "cpu", 1, counting)
                params["tie_quotas"] = [
                    q if q >= UNLIMITED else max(0, q - u) for q, u in zip(params["tie_quotas"], used.tolist())
                ]
        check_bits(torch.cat(parts), whole)


@pytest.mark.parametrize("name", ["weighted_sum", "task_vector_sum", "ties", "sce", "ram", "importance_fusion"])
def test_non_contiguous_inputs_and_output(name):
    op, (stored, compute) = OPS[name], DTYPES["bf16-in-f32"]
    tensors = [t.view(40, 50).t()[3:, 1:] for t in make_tensors(name, 2000, stored)]
    flat, arguments = calls(name, [t.reshape(-1) for t in tensors], compute)[-1]
    tensors = tensors[: len(flat)]
    expected = op(tensors, backend="torch", compute_dtype=torch.float32, **arguments)
    out = torch.full((39, 47), float("nan"), dtype=expected.dtype).t()
    op(tensors, backend="cpu", compute_dtype=torch.float32, out=out, **arguments)
    check_bits(out.contiguous(), expected.contiguous())
    check_bits(op(tensors, backend="cpu", compute_dtype=torch.float32, **arguments), expected.contiguous())


@pytest.mark.parametrize("stored", [d.name for d in dtypes.MERGEABLE])
def test_every_bit_pattern_survives(stored):
    """Loading and storing alone changes no number, subnormal and infinity of the 16-bit types."""
    dtype = dtypes.BY_NAME[stored].to_torch()
    if dtypes.BY_NAME[stored].itemsize == 2:
        values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    else:
        generator = torch.Generator().manual_seed(0)
        bits = torch.randint(-(2**31), 2**31, (100003,), generator=generator)
        values = bits.to(torch.int32).view(torch.float32).to(dtype)
    compute = torch.float64 if stored == "float64" else torch.float32
    out = OPS["weighted_sum"]([values], weights=[1.0], compute_dtype=compute, backend="cpu")
    check_bits(out, values)
    half = values.float().to(torch.float16) if stored != "float16" else values.float().to(torch.bfloat16)
    out = OPS["weighted_sum"]([values], weights=[1.0], compute_dtype=compute, out_dtype=half.dtype, backend="cpu")
    check_bits(out, half)


def test_zero_nonfinite():
    from seme.ops.nonfinite import nonfinite, zero_nonfinite_

    for stored, compute in DTYPES.values():
        tensors = make_tensors("nonfinite", 1023, stored)
        finite = [torch.where(torch.isfinite(t), t, torch.zeros_like(t)) for t in tensors]
        zero_nonfinite_([view(t) for t in tensors])
        for tensor, expected in zip(tensors, finite):
            check_bits(tensor, expected)
        assert nonfinite(tensors).tolist() == [0] * len(tensors), compute
