"""The matrix ops in plain torch and on the CPU: within the bound of float64 for any layout, dtype, size and threads."""

import pytest
import torch

from seme import native, ops
from seme.errors import BackendError, OpError
from seme.ops import library
from seme.ops._registry import MATRIX_OPS, OPS
from seme.ops.magnitude_histogram import BINS
from tests.ops.matrix_cases import BF16, F32, F64, FLOOR, Case, cases, check, make

BACKENDS = [
    "torch",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(native.why_not("_C") is not None, reason="seme._C is not built: SEME_NATIVE=1")
    ),
]
NAMES = list(MATRIX_OPS)
ACCUMULATING = [name for name, op in MATRIX_OPS.items() if op.accumulates]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(found, expected):
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_error_bound(name, backend):
    for dtype, size, view in cases(name):
        case = make(name, dtype, size, view=view)
        check(case, case.run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_tiles(name, backend, monkeypatch):
    """Matrices of many tiles, in every axis, none of them whole."""
    small_tiles(monkeypatch)
    for dtype, view in (("bf16", "rows"), ("f32", "columns"), ("mixed", "mixed")):
        case = make(name, dtype, (257, 129, 263), view=view)
        check(case, case.run(backend))


def small_tiles(monkeypatch):
    from importlib import import_module

    monkeypatch.setattr(import_module("seme.ops._matrix"), "TILE", 65 * 129)
    monkeypatch.setattr(import_module("seme.ops.elect_select"), "ROWS", 3 * 63)
    monkeypatch.setattr(import_module("seme.ops.elect_select"), "LABELS", 50)
    monkeypatch.setattr(import_module("seme.ops.resolve"), "ROWS", 63)


@pytest.mark.parametrize("name", ACCUMULATING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_added_to_out(name, backend):
    case = make(name, "f32")
    check(case, case.run(backend, outs=case.outs(3)), start=3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bf16", "f64"])
def test_row_chunks(dtype, backend):
    """Chunk by chunk, with one mirror at the end, is within the bound of the whole, and so is each chunk's output."""
    for name in ACCUMULATING:
        whole = make(name, dtype, (129, 65, 130))
        outs = whole.outs(0)
        step = 50
        axis = 0 if name == "weighted_gram" else len(whole.operands)
        for start in range(0, 130, step):
            part = slice(start, start + step)
            if name == "weighted_gram":
                operands = [o[part] for o in whole.operands]
            else:
                cut = [[t[part] for t in o] if isinstance(o, list) else o[part] for o in whole.operands[:2]]
                operands = [*cut, *whole.operands[2:axis]]
            arguments = dict(whole.arguments)
            if name.endswith("_gram"):
                arguments["mirror"] = start + step >= 130
            rows = [o[part] for o in outs] if name == "delta_project" else outs
            Case(whole.op, operands, arguments).run(backend, outs=rows)
        check(whole, outs, floor=FLOOR + 3)  # one more rounding for each chunk


@pytest.mark.parametrize("name", ["delta_gram", "weighted_gram"])
@pytest.mark.parametrize("size", [(65, 7, 63), (129, 515, 65)])
@pytest.mark.skipif(native.why_not("_C") is not None, reason="seme._C is not built: SEME_NATIVE=1")
def test_symmetric_to_the_bit(name, size):
    (found,) = make(name, "bf16", size).run("cpu")
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.skipif(native.why_not("_C") is not None, reason="seme._C is not built: SEME_NATIVE=1")
def test_threads(name, threads):
    """Any number of them is within the bound, and the same number gives the same bytes; torch's own is put back."""
    case = make(name, "bf16", (257, 65, 129))
    found = case.run("cpu", threads)
    check(case, found)
    assert same(case.run("cpu", threads), found)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("isa", [0, 1, 2])
@pytest.mark.skipif(native.why_not("_C") is not None, reason="seme._C is not built: SEME_NATIVE=1")
def test_instruction_sets(isa):
    module = native.module()
    if isa > module.best_isa():
        pytest.skip("this machine does not have it")
    module.set_isa(isa)
    try:
        for name in NAMES:
            for dtype in ("bf16", "f16", "f64"):
                case = make(name, dtype)
                check(case, case.run("cpu"))
    finally:
        module.set_isa(module.best_isa())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_any_layout(name, backend):
    """Results go into transposed and stepped memory, and around them nothing is written."""
    case = make(name, "f32", (33, 17, 40))  # kernels for a GPU round bfloat16 operands further
    expected = case.run(backend)
    shapes = [(o.shape, o.dtype) for o in expected]
    for turn in (True, False):
        memory = [torch.full((*shape[:-1], 2 * shape[-1] + 3), -7, dtype=dtype) for shape, dtype in shapes]
        if turn and all(len(shape) == 2 for shape, _ in shapes):
            memory = [torch.full((s[1] + 3, s[0]), -7, dtype=dtype) for s, dtype in shapes]
            outs = [m[1 : s[1] + 1].T for m, (s, _) in zip(memory, shapes)]
        else:
            outs = [m[..., 1 : 2 * s[-1] : 2] for m, (s, _) in zip(memory, shapes)]
        for out, start in zip(outs, case.outs(0)):
            out.copy_(start)
        case.run(backend, outs=outs)
        check(case, [o.contiguous() for o in outs])
        untouched = [int((m == -7).sum()) for m in memory]
        assert untouched == [m.numel() - o.numel() for m, o in zip(memory, outs)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_out_dtype(backend, out_dtype):
    for name in ("project_erase", "elect"):
        case = make(name, "bf16")
        arguments = {**case.arguments, "backend": backend}
        found = getattr(ops, name)(*case.operands, out_dtype=out_dtype, **arguments)
        assert found.dtype == out_dtype
        check(case, [found])
        out = torch.full_like(found, float("nan"))
        assert getattr(ops, name)(*case.operands, out=out, **arguments) is out
        assert torch.equal(out, found)
    assert ops.elect(*case.operands, **arguments).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_and_many(backend):
    for name in ("project_erase", "elect", "elect_select"):
        for experts in (1, 2):
            case = make(name, "bf16", experts=experts)
            check(case, case.run(backend))
    case = make("elect_select", "bf16", experts=1)
    counts, _ = case.run(backend)
    assert counts[0] == 129 * 257, "one expert has no variance"


# elect on exact coordinates


def exact(r=65, d=33, v=70, experts=2, dtype=BF16):
    """Base, experts and bases of small integers: z, its variance over 2 or 4 experts and all sums are exact."""
    gen = torch.Generator().manual_seed(5)

    def integers(*shape):
        return torch.randint(-3, 4, shape, generator=gen).to(torch.float32)

    base = integers(r, d)
    return base.to(dtype), [(base + integers(r, d)).to(dtype) for _ in range(experts)], integers(v, d)


def exact_coordinates(base, tensors, bases):
    z = torch.stack([(t.double() - base.double()) @ bases.double().T for t in tensors])
    return z, ((z - z.mean(0)) ** 2).mean(0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experts", [2, 4])
@pytest.mark.parametrize("dtype", [BF16, F32, F64])
def test_counts_and_energies_are_exact(backend, experts, dtype):
    base, tensors, bases = exact(experts=experts, dtype=dtype)
    z, variance = exact_coordinates(base, tensors, bases)
    keys = variance.float().view(torch.int32).long().flatten()
    most = int(keys.mode().values)
    for lowest, shift in ((0, 15), (most - 5, 0), (most, 3), (most + 1, 8), (2**31 - 1, 0)):
        counts, energies = ops.elect_select(base, tensors, bases, lowest=lowest, shift=shift, backend=backend)
        offset = keys - lowest
        bins = torch.where(offset < 0, -1, (offset >> shift).clamp(max=BINS))
        expected = torch.stack([(bins == b).sum() for b in bins.unique()])
        assert counts[: BINS + 1].sum() == (bins >= 0).sum()
        for bin_, count in zip(bins.unique().tolist(), expected.tolist()):
            if bin_ >= 0:
                assert counts[bin_] == count
                assert energies[:, bin_].tolist() == (z.flatten(1)[:, bins == bin_] ** 2).sum(1).tolist()
        mixed = (bins >= 0) & (bins < BINS) & (offset % (1 << shift) != 0)
        assert counts[BINS + 1] == mixed.sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_calls_find_the_exact_threshold(backend):
    from array import array

    from seme.ops.magnitude_histogram import find

    base, tensors, bases = exact(experts=4)
    _, variance = exact_coordinates(base, tensors, bases)
    keys = variance.float().view(torch.int32).long().flatten()
    k = len(keys) // 10
    wide, _ = ops.elect_select(base, tensors, bases, backend=backend)
    bin_, _ = find(array("q", wide.tolist()), 0, k)
    narrow, energies = ops.elect_select(base, tensors, bases, lowest=bin_ << 15, shift=0, backend=backend)
    last, _ = find(array("q", narrow.tolist()), 0, k - int(narrow[BINS]))
    threshold = (bin_ << 15) + last
    assert threshold == int(keys.sort(descending=True).values[k - 1])
    kept = keys >= threshold
    z, _ = exact_coordinates(base, tensors, bases)
    assert energies[:, last:].sum(1).tolist() == (z.flatten(1)[:, kept] ** 2).sum(1).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_election_by_hand(backend):
    """Signs, ties, zeros and the threshold, in a space where labels are coordinates."""
    base = torch.zeros(1, 6)
    a = torch.tensor([[1.0, 1.0, 3.0, 0.0, -2.0, 0.5]])
    b = torch.tensor([[3.0, -1.0, -4.0, 2.0, 0.0, 0.5]])
    eye = torch.eye(6)
    # 1: both agree. 2: the sum is 0, which counts as plus. 3: minus wins. 4, 5: 0 has no sign, so the other's value.
    # 6: no variance, which threshold 0 keeps and any other erases.
    for threshold, last in ((0, 0.5), (1, 0.0)):
        found = ops.elect(base, [a, b], eye, eye, threshold=threshold, etas=[0.75, 0.25], backend=backend)
        assert found.tolist() == [[1.5, 1.0, -4.0, 2.0, -2.0, last]]
    none = ops.elect(base + 1, [a + 1, b + 1], eye, eye, threshold=2**31 - 1, etas=[0.75, 0.25], backend=backend)
    assert none.tolist() == [[1.0] * 6]
    unheard = ops.elect(base, [a, b], eye, eye, threshold=0, etas=[0.0, 1.0], backend=backend)
    assert unheard.tolist() == [[3.0, 0.0, -4.0, 2.0, 0.0, 0.5]]


# resolve


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_planted_atoms_are_found(backend, dtype):
    gen = torch.Generator().manual_seed(1)
    atoms = torch.linalg.qr(torch.randn(40, 40, generator=gen, dtype=F64))[0]
    bases = torch.cat([atoms[:20], torch.nn.functional.normalize(atoms[20:].sum(0), dim=0)[None].repeat(80, 1)])
    bases = bases[torch.randperm(100, generator=gen)]
    places = torch.stack([(bases @ atom).abs().argmax() for atom in atoms[:20]])
    weights = torch.tensor([3.0, -2.0, 1.5, -1.0], dtype=F64)
    picks = torch.stack([torch.randperm(20, generator=gen)[:4] for _ in range(9)])
    vectors = (weights[None, :, None] * atoms[picks]).sum(1).to(dtype)
    labels, coefficients, residual = ops.resolve(vectors, bases.to(torch.float32), k=4, backend=backend)
    assert torch.equal(labels, places[picks])
    close = 0.02 if dtype == BF16 else 1e-6  # bfloat16 vectors are off by 2^-9 of their entries
    assert (coefficients - weights).abs().max() < close
    assert residual.abs().max() < close


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_ties_go_to_the_lowest_label(backend, dtype):
    """Exact scores with many ties and both signs, over more labels than a tile has, k at either end."""
    gen = torch.Generator().manual_seed(2)
    vectors = torch.randint(-2, 3, (9, 6), generator=gen).to(dtype)
    vectors[3] = 0  # all scores are 0
    bases = torch.randint(-1, 2, (5000, 6), generator=gen).to(dtype)
    scores = (vectors @ bases.T).abs()
    for k in (1, 2, 31, 64):
        expected = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        labels, coefficients, residual = ops.resolve(vectors, bases, k=k, backend=backend)
        assert torch.equal(labels, expected)
        assert not coefficients[3].any()
        assert not residual[3].any()
        back = torch.einsum("nk,nkd->nd", coefficients, bases[labels]) + residual
        assert (back - vectors).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_dependent_and_zero_bases_get_nothing(backend):
    """The first of two equal bases gets all; so does any set whose sum is another; a zero row is worth nothing."""
    e = torch.eye(5)
    bases = torch.stack([e[0], e[0], -e[0], e[1], (e[0] + e[1]) / 2**0.5, e[2], torch.zeros(5)])
    vectors = torch.tensor([[4.0, 1.0, 0.0, 0.0, 0.25], [0.0, 0.0, 0.0, 0.0, 1.0]])
    labels, coefficients, residual = ops.resolve(vectors, bases, k=7, backend=backend)
    assert labels.tolist() == [[0, 1, 2, 4, 3, 5, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert torch.allclose(coefficients, torch.tensor([[3.0, 0, 0, 2**0.5, 0, 0, 0], [0.0] * 7]), atol=1e-6)
    assert torch.allclose(residual, torch.tensor([[0, 0, 0, 0, 0.25], [0, 0, 0, 0, 1.0]]), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_is_orthogonal_on_close_bases(backend):
    """Bases within a few degrees of one another: the normal equations alone would lose half of the digits."""
    gen = torch.Generator().manual_seed(3)
    center = torch.randn(1, 48, generator=gen)
    bases = torch.nn.functional.normalize(center + 0.1 * torch.randn(64, 48, generator=gen), dim=1)
    vectors = center + torch.randn(17, 48, generator=gen)
    case = Case(MATRIX_OPS["resolve"], [vectors, bases], {"k": 24})
    labels, _, residual = found = case.run(backend)
    check(case, found)
    leak = torch.einsum("nkd,nd->nk", bases[labels], residual).abs().max() / vectors.norm(dim=1).max()
    assert leak < 2e-6  # 48 products, each rounded to float32, and the rounding of the residual itself


@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_vectors_end(backend):
    vectors = torch.randn(3, 8, generator=torch.Generator().manual_seed(4))
    vectors[1, 2] = float("nan")
    vectors[2, 0] = float("inf")
    bases = torch.nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(5)), dim=1)
    labels, coefficients, residual = ops.resolve(vectors, bases, k=4, backend=backend)
    assert ((labels >= 0) & (labels < 30)).all()
    assert coefficients[0].isfinite().all()
    assert residual[0].isfinite().all()
    assert residual[1].isnan().any()


def awkward(kind, vectors, bases):
    """Operands that fixed point represents badly, or not at all."""
    if kind == "tiny":
        vectors, bases = vectors * 1e-14, bases * 1e-15
    elif kind == "beyond":  # of what is screened; in float32, so are the squares of "tiny"
        vectors, bases = vectors * 1e-33, bases * 1e3
    elif kind == "vast":
        vectors, bases = vectors * 1e25, bases * 1e-18
    elif kind == "uneven":  # rows of very different norms
        bases = bases * 10.0 ** (torch.arange(len(bases)) % 13 - 9)[:, None]
    elif kind == "spikes":  # nearly all in one entry
        bases[torch.arange(len(bases)), torch.arange(len(bases)) % bases.shape[1]] += 30
    elif kind == "close":  # scores differ by less than the rounding to fixed point changes them
        bases = bases[:1] + 1e-4 * bases
    elif kind == "equal":
        bases = bases[torch.arange(len(bases)) % 40]
    elif kind == "zeros":
        vectors[::2] = 0
        bases[::3] = 0
    elif kind == "nan":
        bases[777] = float("nan")
    return vectors, bases


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "kind", ["plain", "tiny", "beyond", "vast", "uneven", "spikes", "close", "equal", "zeros", "nan"]
)
@pytest.mark.skipif(native.why_not("_C") is not None, reason="seme._C is not built: SEME_NATIVE=1")
def test_screening_misses_nothing(kind, dtype):
    """The k best of all scores, and no others but for rounding; the lowest labels of equal ones; any thread count."""
    from seme.ops.resolve import nearest

    gen = torch.Generator().manual_seed(6)
    for count, width, labels in ((100, 33, 1300), (7, 700, 1040), (97, 1, 700), (1, 16, 64)):
        vectors = torch.randn(count, width, generator=gen).to(dtype)
        bases = torch.randn(max(labels, 800) if kind == "nan" else labels, width, generator=gen).to(dtype)
        vectors, bases = awkward(kind, vectors, bases)
        exact = (vectors.double() @ bases.double().T).abs()
        size = vectors.double().norm(dim=1)[:, None] * bases.double().norm(dim=1)[None, :]
        exact = exact.nan_to_num(nan=float("inf"))
        doubt = torch.finfo(dtype).eps * width * size.nan_to_num(0).amax(1) + 1e-45
        for k in (1, 5, 64):
            scores, found = torch.empty(count, k, dtype=dtype), torch.empty(count, k, dtype=torch.int64)
            nearest(vectors, bases, scores, found, 1)
            assert (found.sort(1).values.diff(dim=1) > 0).all()
            chosen = exact.gather(1, found)
            best = exact.topk(k, dim=1).values
            assert (chosen.amin(1) >= best[:, -1] - doubt).all()
            assert (
                (scores.double().abs().nan_to_num(nan=float("inf")) - chosen).nan_to_num(0).abs() <= doubt[:, None]
            ).all()
            if kind == "equal":  # rows 40 apart have the same score: of these the first ones
                assert all(
                    row[row % 40 == f].max() == f + 40 * (int((row % 40 == f).sum()) - 1)
                    for row in found
                    for f in (row % 40).unique().tolist()
                )
            if kind == "zeros":
                assert torch.equal(found[0].sort().values, torch.arange(k))
            again = torch.empty_like(found), torch.empty_like(scores)
            nearest(vectors, bases, again[1], again[0], 3)
            assert torch.equal(again[0].sort(1).values, found.sort(1).values)


# how ops are called


def call(name, *operands, **arguments):
    return lambda: getattr(ops, name)(*operands, **arguments)


A, B, SQUARE, WIDE = torch.ones(3, 4), torch.ones(3, 5), torch.ones(4, 4), torch.ones(7, 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (call("delta_gram", A, B), r"delta_gram: tensor has shape \[3, 5\], expected \[3, 4\] as base has"),
        (call("delta_gram", A[0], A[0]), r"delta_gram: base has shape \[4\], expected \[any, any\]"),
        (call("delta_gram", A.int(), A), "delta_gram: base is int32; supported: float32"),
        (call("delta_gram", A, A, out=B), r"delta_gram: out is \[3, 5\] float32, expected \[4, 4\] float32"),
        (
            call("delta_project", A, A, A),
            r"delta_project: matrix has shape \[3, 4\], expected \[4, 4\] for the columns",
        ),
        (call("project_erase", A, [], []), r"project_erase: tensors is empty, expected at least one tensor of base's"),
        (call("project_erase", A, [A], []), "project_erase: projections has 0 entries for 1 tensors"),
        (call("project_erase", A, [A, B], [SQUARE] * 2), r"project_erase: tensors\[1\] has shape \[3, 5\]"),
        (call("project_erase", A, [A], [A]), r"project_erase: projections\[0\] has shape \[3, 4\], expected \[4, 4\]"),
        (call("project_erase", A, [A], [SQUARE], out_dtype=torch.int8), "project_erase: out is int8; supported"),
        (call("semantic_energy", WIDE, A), r"semantic_energy: moment has shape \[3, 4\], expected \[4, 4\]"),
        (call("weighted_gram", WIDE, A), r"weighted_gram: weights has shape \[3, 4\], expected \[7\]"),
        (call("elect_select", A, [A], B), r"elect_select: bases has shape \[3, 5\], expected \[any, 4\]"),
        (call("elect_select", A, [A], WIDE, shift=16), "elect_select: shift is 16, expected 0 to 15"),
        (call("elect_select", A, [A], WIDE, lowest=-1), "elect_select: lowest is -1, expected a key"),
        (call("elect_select", A, [A], WIDE, out=(A,)), "elect_select: out has 1 tensors, expected counts, energies"),
        (call("elect", A, [A], WIDE, A, threshold=0, etas=[1]), r"elect: dual has shape \[3, 4\], expected \[7, 4\]"),
        (call("elect", A, [A], WIDE, WIDE, threshold=0, etas=[]), "elect: etas has 0 entries for 1 tensors"),
        (
            call("elect", A, [A], WIDE, WIDE, threshold=2**31, etas=[1]),
            "elect: threshold is 2147483648, expected a key",
        ),
        (call("resolve", A, B, k=1), r"resolve: bases has shape \[3, 5\], expected \[any, 4\]"),
        (call("resolve", A, WIDE, k=8), "resolve: k is 8, but bases has only 7 rows"),
        (call("resolve", A, WIDE, k=0), "resolve: k is 0, expected 1 to 64"),
        (call("resolve", A, WIDE, k=65), "resolve: k is 65, expected 1 to 64"),
        (call("resolve", A, WIDE.to("meta"), k=1), "resolve: tensors on cpu and meta; one device expected"),
    ],
)
def test_messages(wrong, message):
    with pytest.raises(OpError, match=message):
        wrong()


def test_backends():
    with pytest.raises(BackendError, match="backend cuda: backend cuda works on CUDA tensors, not on cpu"):
        ops.delta_gram(A, A, backend="cuda")
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        ops.elect_select(A, [A], WIDE, backend="gpu")


def test_a_cuda_kernel_that_does_not_exist(monkeypatch):
    """Named, it is an error; where it is only what auto comes to, plain torch computes."""
    from seme.ops import _matrix

    monkeypatch.setattr(_matrix, "choose_backend", lambda backend, device: "cuda")
    with pytest.raises(BackendError, match="delta_gram has no CUDA C\\+\\+ kernel; use triton or torch"):
        ops.delta_gram(A, A + 1, backend="cuda")
    assert torch.equal(ops.delta_gram(A, A + 1), torch.full((4, 4), 3.0))


def test_without_the_module_torch_computes(monkeypatch):
    from seme.ops import _op

    monkeypatch.setitem(native._loaded, "_C", "not built")
    monkeypatch.setattr(_op, "_warned", True)
    assert torch.equal(ops.delta_gram(A, A + 1), torch.full((4, 4), 3.0))
    with pytest.raises(BackendError, match="not built"):
        ops.delta_gram(A, A, backend="cpu")


def test_element_wise_table_has_no_matrix_ops():
    assert not OPS.keys() & MATRIX_OPS.keys()
    assert {"elect", "resolve", "project_erase"} <= MATRIX_OPS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    case = make(name, "f32", (6, 5, 9))
    torch.library.opcheck(library.packet(name).default, tuple(case.operands), case.arguments)
    outs = dict(zip(case.op.results, case.outs(0)))
    torch.library.opcheck(library.packet(name).out, tuple(case.operands), {**case.arguments, **outs})


def test_fake_kernels_check_as_the_kernels_do():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        with pytest.raises(OpError, match="resolve: k is 8, but bases has only 7 rows"):
            torch.ops.seme.resolve(torch.empty(3, 4), torch.empty(7, 4), k=8)
        labels, coefficients, residual = torch.ops.seme.resolve(torch.empty(3, 4), torch.empty(7, 4), k=2)
        assert (labels.shape, coefficients.shape, residual.shape) == ((3, 2), (3, 2), (3, 4))
        assert torch.ops.seme.delta_gram(torch.empty(3, 4), torch.empty(3, 4, dtype=F64)).dtype == F64
