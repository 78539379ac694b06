"""The ops against references that are written from the definition, in float64, and share no code with them."""

import math

import pytest
import torch

from seme.native import BLOCK
from seme.ops import (
    importance_fusion,
    importance_histogram,
    inner_products,
    line_products,
    line_sum,
    magnitude_histogram,
    nearswap,
    nonfinite,
    overlap_counts,
    ram,
    row_divergence,
    sce,
    selected_squares,
    task_vector_sum,
    tie_counts,
    ties,
    trimmed_l1,
    variance_histogram,
    variance_ties,
    weighted_sum,
)
from seme.ops.magnitude_histogram import find

BACKENDS = ("torch", "cpu")
HUGE = 2**62
# One rounding of a value of magnitude below 8 in float32, for each of the few operations of a formula.
FLOAT32 = 8 * 8 * 2.0**-24


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def test_weighted_sum(backend):
    tensors = [normal(33, 77, seed=i) for i in range(3)]
    got = weighted_sum(tensors, [0.5, -0.25, 2.0], divisor=1.5, backend=backend)
    want = (0.5 * tensors[0].double() - 0.25 * tensors[1].double() + 2 * tensors[2].double()) / 1.5
    assert (got - want).abs().max() < FLOAT32


def test_task_vector_sum(backend):
    base, a, b = (normal(33, 77, seed=i) for i in range(3))
    got = task_vector_sum(base, [a, b], [0.3, 0.9], divisor=1.2, scale=0.7, backend=backend)
    want = base.double() + 0.7 * (0.3 * (a.double() - base) + 0.9 * (b.double() - base)) / 1.2
    assert (got - want).abs().max() < FLOAT32


def test_inner_products(backend):
    a, b = normal(3 * BLOCK + 5), normal(3 * BLOCK + 5, seed=1)
    blocks = inner_products([a, b], backend=backend)
    assert blocks.shape == (4, 2, 2)
    for i, x in enumerate((a, b)):
        for j, y in enumerate((a, b)):
            want = math.fsum((x.double() * y.double()).tolist())
            # float64 sums of 8192 products each: 2^-53 per addition.
            assert math.fsum(blocks[:, i, j].tolist()) == pytest.approx(want, abs=8192 * 4 * 2.0**-53 * 100)


def test_line_products(backend):
    """Of rows, of columns in blocks of two rows of which the last is one, of differences from the first."""
    base, a, b = (normal(5, 70, seed=i) for i in range(3))
    rows = line_products([a, b], row=70, backend=backend)
    columns = line_products([a, b], row=140, columns=70, backend=backend)
    relative = line_products([base, a, b], relative=True, row=70, compute_dtype=torch.float64, backend=backend)
    assert (rows.shape, columns.shape, relative.shape) == ((5, 2, 2), (3, 2, 2, 70), (5, 2, 2))
    limit = 70 * 16 * 2.0**-53  # roundings of sums of 70 products below 16
    for i, x in enumerate((a.double(), b.double())):
        for j, y in enumerate((a.double(), b.double())):
            assert (rows[:, i, j] - (x * y).sum(1)).abs().max() < limit
            assert (columns.sum(0)[i, j] - (x * y).sum(0)).abs().max() < limit
            want = ((x - base.double()) * (y - base.double())).sum(1)
            assert (relative[:, i, j] - want).abs().max() < 4 * limit


@pytest.mark.parametrize("relative", [False, True])
def test_line_sum(backend, relative):
    tensors = [normal(6, 50, seed=i) for i in range(3)]
    vectors = [t.double() - tensors[0] if relative else t.double() for t in tensors[relative:]]
    base = tensors[0].double() if relative else 0
    n = len(vectors)
    by_row, by_column = normal(6, n, seed=9), normal(n, 50, seed=10)
    got = line_sum(tensors, by_row.flatten().tolist(), relative=relative, row=50, backend=backend)
    want = base + sum(by_row[:, i : i + 1].double() * v for i, v in enumerate(vectors))
    assert (got - want).abs().max() < 4 * FLOAT32
    got = line_sum(tensors, by_column.flatten().tolist(), relative=relative, columns=50, backend=backend)
    want = base + sum(by_column[i].double() * v for i, v in enumerate(vectors))
    assert (got - want).abs().max() < 4 * FLOAT32
    part = line_sum(
        [t.flatten()[120:200] for t in tensors],
        by_column.flatten().tolist(),
        relative=relative,
        columns=50,
        offset=120,
        backend=backend,
    )
    assert torch.equal(part, got.flatten()[120:200])


def test_nearswap(backend):
    base, other = torch.tensor([1.0, 1.0, 1.0, -2.0]), torch.tensor([1.0, 1.5, 3.0, 2.0])
    # shares 1, 1, 0.5 and 0.25: exact but for the reciprocals' rounding
    assert torch.allclose(nearswap(base, [other], 1.0, backend=backend), torch.tensor([1.0, 1.5, 2.0, -1.0]), atol=1e-6)
    assert torch.equal(nearswap(base, [other], -1.0, backend=backend), base)


def test_inner_products_of_large_values_do_not_overflow(backend):
    x = torch.full((100,), 3e38)
    assert inner_products([x], backend=backend)[0, 0, 0].item() == pytest.approx(100 * 3e38**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_histogram_finds_the_kth_magnitude(backend, dtype):
    """Bin, count above and the remaining rank agree with a sort, for every rank of a small tensor."""
    base, tuned = normal(300).to(dtype), normal(300, seed=1).to(dtype)
    delta = tuned - base
    width = {2: 15, 4: 31, 8: 63}[delta.element_size()]
    shift = max(0, width - 16)
    counts = magnitude_histogram(base, [tuned], lowest=[0], shift=[shift], compute_dtype=dtype, backend=backend)
    from array import array

    data = array("q", counts.flatten().tolist())
    ordered = delta.abs().sort(descending=True).values
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[delta.element_size()]
    keys = ordered.view(bits).tolist()
    for k in range(1, 301):
        bin_, above = find(data, 0, k)
        assert bin_ == keys[k - 1] >> shift
        assert above == sum(key >> shift > bin_ for key in keys)
    assert find(data, 0, 301) == (-1, 300)


def test_histogram_window(backend):
    base = torch.zeros(6)
    tuned = torch.tensor([0.0, -1.0, 1.0, 2.0, -4.0, 1.5])
    one = torch.tensor(1.0).view(torch.int32).item()
    counts = magnitude_histogram(base, [tuned], lowest=[one], shift=[7], backend=backend)[0]
    assert counts[0] == 2  # both ones
    assert counts[(1 << 22) >> 7] == 1  # 1.5
    assert counts[65536] == 2  # 2 and 4 lie beyond 65536 * 128 keys
    assert counts[:65536].sum() == 3  # zero is below the window
    assert counts[65537] == 0
    odd = torch.tensor([one + 1], dtype=torch.int32).view(torch.float32)
    mixed = magnitude_histogram(torch.zeros(1), [odd], lowest=[one], shift=[7], backend=backend)[0]
    assert mixed[65537] > 0


def test_tie_counts(backend):
    base = torch.zeros(7)
    tuned = torch.tensor([1.0, -1.0, 0.5, 0.0, 1.0, 2.0, -0.0])
    keys = [torch.tensor(v).view(torch.int32).item() for v in (1.0, 0.0)]
    assert tie_counts(base, [tuned, tuned], keys, backend=backend).tolist() == [3, 2]


def brute_ties(base, tensors, weights, kept, normalize, scale):
    """Element by element in Python, as the paper says it."""
    out = []
    for e in range(len(base)):
        terms = [w * (t[e] - base[e]) if k[e] else 0.0 for w, t, k in zip(weights, tensors, kept)]
        sign = 1 if sum(terms) >= 0 else -1
        agree = [i for i, p in enumerate(terms) if p * sign > 0]
        merged = sum(terms[i] for i in agree)
        divisor = sum(weights[i] for i in agree)
        out.append(base[e] + scale * (merged / divisor if normalize and divisor else merged))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties(backend, normalize):
    """Multiples of 1/64, so that every sum is exact and equal magnitudes are frequent."""
    base, *tensors = ((normal(500, seed=i) * 16).round() / 64 for i in range(4))
    weights = [0.5, 1.0, -0.25]
    thresholds, quotas, kept = [], [3, HUGE, 0], []
    for tensor, quota in zip(tensors, quotas):
        magnitude = (tensor - base).abs()
        threshold = magnitude.sort(descending=True).values[100]
        thresholds.append(threshold.view(torch.int32).item())
        seen, mask = 0, []
        for value in magnitude.tolist():
            tied = value == threshold.item()
            mask.append(value > threshold.item() or (tied and seen < quota))
            seen += tied
        assert seen > 3, "the test needs ties at the threshold"
        kept.append(mask)
    arguments = {"thresholds": thresholds, "tie_quotas": quotas, "normalize": normalize, "scale": 0.5}
    got = ties(base, tensors, weights, **arguments, backend=backend)
    lists = [t.tolist() for t in tensors]
    want = brute_ties(base.tolist(), lists, weights, kept, normalize, 0.5)
    assert (got - want).abs().max() < FLOAT32


def test_trimmed_l1(backend):
    base, tuned = normal(2 * BLOCK + 9), normal(2 * BLOCK + 9, seed=1)
    magnitude = (tuned - base).abs()
    threshold = magnitude.sort().values[5000]
    sums = trimmed_l1(base, [tuned], thresholds=[threshold.view(torch.int32).item()], tie_quotas=[0], backend=backend)
    assert sums.shape == (3, 1, 2)
    before, after = (math.fsum(sums[:, 0, i].tolist()) for i in range(2))
    assert before == pytest.approx(math.fsum(magnitude.double().tolist()), rel=1e-13)  # float64 sums of 8192
    assert after == pytest.approx(math.fsum(magnitude[magnitude > threshold].double().tolist()), rel=1e-13)


def test_nonfinite(backend):
    x = torch.tensor([1.0, float("inf"), float("nan"), -float("inf"), 0.0])
    assert nonfinite([x, torch.zeros(5), x.to(torch.bfloat16)], backend=backend).tolist() == [3, 0, 3]


def on_a_grid(count, numel=500):
    """Multiples of 1/64, so that sums are exact and equal variances frequent."""
    return [(normal(numel, seed=i) * 16).round() / 64 for i in range(count)]


def by_variance(base, tensors, k):
    """The k positions of largest variance over the task vectors, the first of equal ones; and the k-th variance."""
    columns = [[t[e] - base[e] for t in tensors] for e in range(len(base))]
    means = [math.fsum(c) / len(c) for c in columns]
    variances = [math.fsum((d - m) ** 2 for d in c) / len(c) for c, m in zip(columns, means)]
    order = sorted(range(len(base)), key=lambda e: -variances[e])  # stable
    return set(order[:k]), variances[order[k - 1]], variances


def test_selection_by_variance(backend):
    """Two task vectors, whose variance (a - b)^2 / 4 is exact, so that ties are."""
    base, *tensors = on_a_grid(3)
    lists = [t.tolist() for t in tensors]
    chosen, threshold, variances = by_variance(base.tolist(), lists, 100)
    key = torch.tensor(threshold).view(torch.int32).item()
    above, equal = (sum(v > threshold for v in variances), sum(v == threshold for v in variances))
    assert 0 < 100 - above < equal, "the test needs ties at the threshold"
    assert variance_ties(base, tensors, [key], backend=backend).tolist() == [equal]
    counts = variance_histogram(base, tensors, lowest=key, shift=0, backend=backend)[0]
    assert counts[0] == equal
    assert counts.sum() == above + equal
    squares = selected_squares(base, tensors, [key], [100 - above], backend=backend)
    for i, tensor in enumerate(tensors):
        want = math.fsum((tensor[e].item() - base[e].item()) ** 2 for e in chosen)
        assert squares[0, i].item() == want  # exact: few bits
    got = sce(base, tensors, [1.0, 1.0], thresholds=[key], tie_quotas=[100 - above], backend=backend)
    untouched = [e for e in range(500) if e not in chosen]
    assert torch.equal(got[untouched], base[untouched])
    # Where they agree in sign the mean, where not the larger one.
    for e in chosen:
        a, b = (t[e].item() - base[e].item() for t in tensors)
        move = (a + b) / 2 if a * b > 0 else a if a * (a + b) > 0 or (a + b == 0 and a > 0) else b
        assert abs(got[e].item() - (base[e].item() + move)) < FLOAT32


def test_sce_takes_coefficients(backend):
    base, *tensors = on_a_grid(4)
    coefficients = [0.5, 0.125, 0.375]
    got = sce(base, tensors, coefficients, thresholds=[0], tie_quotas=[HUGE], backend=backend)
    for e in range(500):
        moves = [t[e].item() - base[e].item() for t in tensors]
        sign = 1 if sum(moves) >= 0 else -1
        agree = [i for i, d in enumerate(moves) if d * sign > 0]
        share = sum(coefficients[i] for i in agree)
        want = base[e].item() + (sum(coefficients[i] * moves[i] for i in agree) / share if agree else 0)
        assert abs(got[e].item() - want) < FLOAT32
    # Alone with a coefficient that is next to nothing: divided by 1e-6, not by 1e-7.
    got = sce(torch.zeros(1), [torch.ones(1)], [1e-7], thresholds=[0], tie_quotas=[HUGE], backend=backend)
    assert got.item() == pytest.approx(0.1)


def test_ram(backend):
    base, *tensors = on_a_grid(4)
    tensors = [torch.where(normal(500, seed=9 + i) < 0, base, t) for i, t in enumerate(tensors)]
    scales = [1.5, 1.0, 0.75]
    got = ram(base, tensors, scales, epsilon=0.0625, backend=backend)
    counts = [[0, 0] for _ in tensors]
    for e in range(500):
        moves = {i: t[e].item() - base[e].item() for i, t in enumerate(tensors)}
        moves = {i: d for i, d in moves.items() if abs(d) > 0.0625}
        for i in moves:
            counts[i][len(moves) == 1] += 1
        alone = len(moves) == 1
        want = sum(scales[i] * d if alone else d / len(moves) for i, d in moves.items())
        assert abs(got[e].item() - (base[e].item() + want)) < FLOAT32
    assert overlap_counts(base, tensors, epsilon=0.0625, backend=backend).tolist() == counts
    assert all(n > 0 for pair in counts for n in pair)


def test_row_divergence(backend):
    """A light fine-tune, whose divergence is far below what float32 could sum up."""
    base = normal(7, 33).double()
    tuned = base + 1e-5 * normal(7, 33, seed=1).double()
    got = row_divergence(base, tuned, row=33, backend=backend)
    for r in range(7):
        weights = [[math.exp(v) for v in t[r].tolist()] for t in (tuned, base)]
        p, q = ([v / math.fsum(row) + 1e-8 for v in row] for row in weights)
        want = math.fsum(a * math.log(a / b) for a, b in zip(p, q))
        # 1e-16 for each logarithm, of which the divergence, 5e-11, is what is left.
        assert got[r].item() == pytest.approx(want, abs=33 * 2e-16)
    assert row_divergence(base, base, row=33, backend=backend).tolist() == [0.0] * 7


def test_importance(backend):
    base, tuned = normal(7, 33), normal(7, 33, seed=1)
    factors = [0.5, 0.0, 2.0, 1.0, 0.25, 4.0, 1.0]
    score = (tuned - base).abs() * torch.tensor(factors)[:, None]
    threshold = score.flatten().sort().values[150].item()
    got = importance_fusion(base, tuned, factors, row=33, threshold=threshold, backend=backend)
    assert torch.equal(got, torch.where(score >= threshold, base + (tuned - base), base))
    key = torch.tensor(threshold).view(torch.int32).item()
    counts = importance_histogram(base, tuned, factors, row=33, lowest=[key, 0], shift=[15, 15], backend=backend)
    assert counts.sum(1)[0] - counts[0, 65537] == (score >= threshold).sum()
    assert counts[1, :65536].sum() == 7 * 33
    assert counts[1, 0] == (score == 0).sum() >= 33


def test_keys_of_importances_keep_their_order_in_bfloat16(backend):
    """Factors may be negative there: the smallest importances are those of large changes in such rows."""
    base, tuned = normal(6, 40).to(torch.bfloat16), normal(6, 40, seed=1).to(torch.bfloat16)
    factors = [-1.0, 0.5, -0.25, 2.0, 0.0, 1.0]
    score = ((tuned - base).abs() * torch.tensor(factors, dtype=torch.bfloat16)[:, None]).flatten()
    counts = importance_histogram(
        base, tuned, factors, row=40, lowest=[0], shift=[0], compute_dtype=torch.bfloat16, backend=backend
    )[0]
    _, multiplicity = (score + 0.0).unique(return_counts=True)  # ascending; -0 is 0
    assert counts[:65536][counts[:65536] > 0].tolist() == multiplicity.tolist()
