"""The compiled module checks every count and size itself: behind it there are only pointers."""

import errno

import pytest
import torch

from seme import native

pytestmark = pytest.mark.skipif(native.why_not("_C") is not None, reason="seme._C is not built: SEME_NATIVE=1")
F32, F64, INT64 = 0, 3, -1
N = 100
X = torch.ones(N)
OUT = torch.full((N,), float("nan"))


def view(tensor, numel=None, code=F32):
    return tensor.data_ptr(), tensor.numel() if numel is None else numel, code


# Large enough for every result below; only addresses are passed on, so the tensors have to stay.
DOUBLES = torch.zeros(8, dtype=torch.float64)
INTEGERS = torch.zeros(65538, dtype=torch.int64)


def doubles(count):
    return view(DOUBLES, count, F64)


def integers(count):
    return view(INTEGERS, count, INT64)


TWO = [view(X), view(X)]
PLACE = (0, 0, 0)
UNEQUAL = [view(X), view(X, N - 1)]

ALL = ([0], [0], [1], [0], 0, [], 0)  # a selection
# Of every op: a call that works (arguments before the output, output), and the position of each per-tensor list.
CALLS = {
    "weighted_sum": (([1.0, 1.0], 1.0, F32), view(OUT), [0]),
    "task_vector_sum": (([1.0], [1.0], ALL, 1.0, 1.0, F32), view(OUT), [0, 1]),
    "inner_products": ((F32,), doubles(4), []),
    "magnitude_histogram": (([0], [0], F32), integers(65538), [0, 1]),
    "line_products": ((False, 8192, 0, F32), doubles(4), []),
    "line_sum": ((False, [1.0, 1.0], PLACE, F32), view(OUT), [1]),
    "nearswap": ((0.1, 1e-6, F32), view(OUT), []),
    "tie_counts": (([0], F32), integers(1), []),
    "ties": (([1.0], [1.0], ALL, True, 1.0, F32), view(OUT), [0, 1]),
    "trimmed_l1": ((ALL, F32), doubles(2), []),
    "variance_histogram": ((0, 0, F32), integers(65538), []),
    "variance_ties": ((0, F32), integers(1), []),
    "selected_squares": ((0, 2**62, F32), doubles(1), []),
    "sce": (([1.0], 0, 2**62, F32), view(OUT), [0]),
    "ram": (([1.0], 1e-5, True, F32), view(OUT), [0]),
    "overlap_counts": ((1e-5, F32), integers(2), []),
    "row_divergence": ((25, False, F32), doubles(4), []),
    "importance_histogram": ((doubles(4), 25, [0], [0], F32), integers(65538), []),
    "importance_fusion": ((doubles(4), 25, 0.5, F32), view(OUT), []),
}


@pytest.mark.parametrize("name", CALLS)
def test_counts_and_sizes(name):
    arguments, out, lists = CALLS[name]
    op = getattr(native.module(), name)
    op(TWO, *arguments, out, 1)
    with pytest.raises(ValueError, match="tensors differ in size"):
        op(UNEQUAL, *arguments, out, 1)
    with pytest.raises(ValueError, match="no tensors"):
        op([], *arguments, out, 1)
    with pytest.raises(ValueError, match=r"tensors differ in size|out has .* elements, expected"):
        op(TWO, *arguments, (out[0], out[1] - 1, out[2]), 1)
    with pytest.raises(ValueError, match="dtype"):
        op(TWO, *arguments, (*out[:2], 7), 1)
    with pytest.raises(ValueError, match="null address"):
        op(TWO, *arguments, (0, *out[1:]), 1)
    with pytest.raises(ValueError, match="null address"):
        op([TWO[0], (0, N, F32)], *arguments, out, 1)
    with pytest.raises(ValueError, match=r"dtype code 9 is not 0\.\.3"):
        op(TWO, *arguments[:-1], 9, out, 1)
    for position in lists:
        more = [*arguments[:position], arguments[position] * 2, *arguments[position + 1 :]]
        with pytest.raises(ValueError, match="one per tensor expected"):
            op(TWO, *more, out, 1)


@pytest.mark.parametrize(
    "selection",
    [
        ([0, 0, 0], [0, 0, 0], [], [], 0, [], 0),
        ([0], [0, 0], [], [], 0, [], 0),
        ([0, 0], [0], [], [], 0, [], 0),
        ([], [0], [], [], 0, [], 0),
        ([], [], [1], [], 0, [], 0),
        ([], [], [1, 1], [1, 1], 0, [], 0),
        ([], [], [1], [1], 0, [1, 1], 10),
    ],
)
def test_selections(selection):
    with pytest.raises(ValueError, match="one per tensor expected"):
        native.module().trimmed_l1(TWO, selection, F32, doubles(2), 1)
    with pytest.raises(ValueError, match="one per tensor expected"):
        native.module().tie_counts(TWO, [0, 0, 0], F32, integers(3), 1)


def test_ranks():
    for selection, message in (
        (([], [], [1], [1], 0, [1], 0), "go together"),
        (([], [], [1], [1], 0, [], 10), "go together"),
        (([], [], [1], [1], 0, [1], -10), "go together"),
        (([], [], [1], [1], 0, [1], 30), "not whole rows"),
        (([], [], [1], [1], 0, [-1], 10), "spread is not"),
        (([0], [0], [1], [1], 0, [1], 10), "exclude each other"),
        (([], [], [1], [1], 0, [1], 10), "out has 2 elements, expected 20"),
    ):
        with pytest.raises(ValueError, match=message):
            native.module().trimmed_l1(TWO, selection, F32, doubles(2), 1)


def test_rows_and_columns():
    module = native.module()
    for place, message in (
        ((30, 0, 0), "not whole rows"),
        ((50, 0, 0), "one per tensor expected"),
        ((0, 10, 0), "one per tensor expected"),
        ((50, 10, 0), "no such rows"),
        ((0, 0, -1), "no such rows"),
    ):
        for relative in (False, True):
            with pytest.raises(ValueError, match=message):
                module.line_sum(TWO, relative, [1.0] * (2 - relative), place, F32, view(OUT), 1)
    for relative, block, columns, message in (
        (True, 100, 0, "out has 4 elements, expected 1"),
        (False, 50, 0, "out has 4 elements, expected 8"),
        (False, 0, 0, "not whole rows"),
        (False, 100, 30, "not whole rows"),
        (False, 105, 10, "not whole rows"),
    ):
        with pytest.raises(ValueError, match=message):
            module.line_products(TWO, relative, block, columns, F32, doubles(4), 1)
    with pytest.raises(ValueError, match="no tensors"):
        module.line_products(TWO[:1], True, 100, 0, F32, doubles(4), 1)


def test_windows():
    op = native.module().magnitude_histogram
    for lowest, shift, message in (
        ([-1], [0], "lowest is negative"),
        ([0], [48], "shift is not"),
        ([0], [-1], "shift"),
    ):
        with pytest.raises(ValueError, match=message):
            op(TWO, lowest, shift, F32, integers(65538), 1)


def test_rows():
    module = native.module()
    with pytest.raises(ValueError, match="no whole rows"):
        module.row_divergence(TWO, 30, False, F32, doubles(3), 1)
    with pytest.raises(ValueError, match="a base and one tensor expected"):
        module.row_divergence([*TWO, TWO[0]], 25, False, F32, doubles(4), 1)
    for factors in (doubles(3), view(X, 4)):
        with pytest.raises(ValueError, match=r"out has 3 elements, expected 4|wrong dtype"):
            module.importance_fusion(TWO, factors, 25, 0.5, F32, view(OUT), 1)
    with pytest.raises(ValueError, match="one shift per window"):
        module.importance_histogram(TWO, doubles(4), 25, [0], [0, 0], F32, integers(65538), 1)


def test_nonfinite():
    op = native.module().nonfinite
    op(UNEQUAL, integers(2), 1, False)  # tensors of different sizes are fine here
    with pytest.raises(ValueError, match="out has 1 elements, expected 2"):
        op(UNEQUAL, integers(1), 1, False)
    with pytest.raises(ValueError, match="out has the wrong dtype"):
        op(UNEQUAL, doubles(2), 1, False)


def test_host_helpers():
    module = native.module()
    with pytest.raises(ValueError, match="no counts"):
        module.find_in_histogram(0, 5, 1)
    with pytest.raises(ValueError, match="no memory to add"):
        module.add_int64(0, 0, 5)
    counts = torch.tensor([2, 0, 3])
    assert [module.find_in_histogram(counts.data_ptr(), 3, k) for k in (1, 3, 4, 5, 6)] == [
        (2, 0), (2, 0), (0, 3), (0, 3), (-1, 5)
    ]  # fmt: skip
    module.add_int64(counts.data_ptr(), counts.data_ptr(), 3)
    assert counts.tolist() == [4, 0, 6]


def test_runs_outside_of_the_memory():
    module = native.module()
    with pytest.raises(ValueError, match="no memory to read into"):
        module.read_runs(0, 1, 0, 0, 0, 0, 0)
    buffer = torch.zeros(8, dtype=torch.uint8)
    for offset, place, size in ((-1, 0, 1), (0, -1, 1), (0, 0, -1), (0, 5, 4), (0, 0, 9), (0, 2**62, 1)):
        run = torch.tensor([[offset], [place], [size]])
        with pytest.raises(ValueError, match="a run lies outside of the memory"):
            module.read_runs(0, 1, *(x.data_ptr() for x in run), buffer.data_ptr(), 8)
    run = torch.tensor([[0], [0], [1]])
    done, error = module.read_runs(-1, 1, *(x.data_ptr() for x in run), buffer.data_ptr(), 8)
    assert (done, error) == (0, errno.EBADF)


def test_instruction_set_beyond_the_machine():
    module = native.module()
    with pytest.raises(ValueError, match="does not have the instruction set"):
        module.set_isa(module.best_isa() + 1)
