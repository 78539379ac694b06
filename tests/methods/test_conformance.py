"""Laws that every registered method obeys; a new method is tried without a line here unless it needs arguments."""

import os

import pytest
import torch

import seme
from seme.errors import ConfigError
from seme.methods import get, methods

# Arguments with which a method that has required parameters can be called; more than one case may be given. With BASE a
# method is given the base model that it can do without.
BASE = "base model"
SPARSE = {"weight": [0.5, 0.25], "density": [0.25, 0.75], "rescale": True, "lambda": 0.5}
ARGUMENTS = {
    "breadcrumbs": [{**SPARSE, "gamma": [0.05, 0.4]}, {"weight": [1.0, 1.0], "density": 0.5, "normalize": True}],
    "breadcrumbs_ties": [{**SPARSE, "gamma": [0.05, 0.4]}, {"weight": 1.0, "density": 0.9, "normalize": True}],
    "dare_linear": [SPARSE, {"weight": 1.0, "density": 0.5, "normalize": True, "rescale": False}],
    "dare_ties": [SPARSE, {"weight": 1.0, "density": 0.5, "normalize": True, "rescale": False}],
    "della": [{**SPARSE, "epsilon": [0.2, 0.1]}, {"weight": 1.0, "density": [0.5, 1.0], "rescale": False}],
    "della_linear": [{**SPARSE, "epsilon": [0.2, 0.1]}, {"weight": 1.0, "density": [0.5, 0.0], "normalize": True}],
    "karcher": [{}, {"max_iter": 1}],
    "linear": [{"weight": [0.25, 0.5, 0.25]}],
    "model_stock": [{}, {"filter_wise": True}],
    "multislerp": [
        {"weight": [0.25, 0.5, 0.25]},
        {"weight": 1e-9},
        {"weight": [0.25, 0.5], BASE: True},
        {"weight": [0.75, 0.25], BASE: True, "normalize_weights": False},
    ],
    "nearswap": [{"t": 0.75}, {"t": -1.0}],
    "nuslerp": [
        {"weight": [0.5, 0.25]},
        {"weight": [0.5, 0.25], "nuslerp_flatten": False},
        {"weight": [0.5, 0.25], "nuslerp_flatten": False, "nuslerp_row_wise": True},
        {"weight": [0.5, 0.25], BASE: True},
        {"weight": [0.5, 0.25], BASE: True, "nuslerp_flatten": False},
        {"weight": [0.5, 0.25], BASE: True, "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ],
    "passthrough": [{}, {"scale": [1.5]}],
    "task_arithmetic": [{"weight": [0.5, 0.25], "lambda": 0.5}, {"weight": [0.5, 0.25], "normalize": True}],
    "slerp": [{"t": 0.25}],
    "ties": [{"weight": [0.5, 0.25], "density": [0.25, 0.75]}, {"weight": [1.0, 1.0]}],
    "arcee_fusion": [{}],
    "ram": [{"epsilon": 0.1}],
    "ramplus_tl": [{"epsilon": 0.5, "r": 0.5, "alpha": 5.0}, {}, {"epsilon": 0}],
    "sce": [{}, {"select_topk": 0.4}],
    "seme": [{}, {"weight": [0.5, 2.0], "rho": 0.3, "lambda": 0.5}],
    "tsv_m": [{}],
    "iso_c": [{"weight": [0.5, 0.25]}],
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
"""Methods that draw random numbers, which depend on the tensor's name and the model's place."""
CASES = [(name, case) for name, cases in ARGUMENTS.items() for case in cases]
ELEMENTWISE = [(name, case) for name, case in CASES if not get(name).matrix]


def tolerance(name):
    """The inputs are below 2 and exact. A formula of an element has about ten operations, rounded to float32 each; a
    matrix method has sums of 40 products and solves systems whose condition is some hundreds."""
    return (1e4 if get(name).matrix else 40) * 2.0**-24


BACKENDS = ("torch", "cpu", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []))


def has_base(name, case):
    return get(name).base == "required" or BASE in case


def inputs(name, case, shape=(40, 33), dtype=torch.float32):
    """As many tensors as the method takes at most, up to three, of multiples of 1/64: sums are exact, ties many."""
    count = min((get(name).max_inputs or 3) + (get(name).base == "optional" and BASE in case), 3)
    generator = torch.Generator().manual_seed(count)
    return [(torch.randint(-127, 128, shape, generator=generator) / 64).to(dtype) for _ in range(count)]


def run(name, tensors, case, **options):
    base = 0 if has_base(name, case) else None
    case = {k: v for k, v in case.items() if k != BASE}
    models = [{"w": t} for t in tensors]
    return seme.merge_state_dicts(models, name, base=base, parameters=case, **options)["w"]


def reference(name, tensors, case):
    method = get(name)
    arguments = {p.name: case.get(p.name, p.default) for p in method.params}
    experts = len(tensors) - has_base(name, case)
    for p in method.params:
        if p.scope != "shared" and not isinstance(arguments[p.name], list):
            arguments[p.name] = [arguments[p.name]] * experts
    if "lambda" in arguments:
        arguments["lambda_"] = arguments.pop("lambda")
    if name in RANDOM:
        arguments["name"] = "w"
    return method.reference(tensors, base=0 if has_base(name, case) else None, **arguments)


def test_every_method_has_a_case():
    assert set(ARGUMENTS) == set(methods())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_equals_its_reference(name, case, backend):
    tensors = inputs(name, case)
    found = run(name, tensors, case, backend=backend)
    assert (found - reference(name, tensors, case)).abs().max() <= tolerance(name)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_all_inputs_equal_give_that_input(name, case):
    tensors = [inputs(name, case)[0]] * len(inputs(name, case))
    # slerp and linear multiply by coefficients that add up to one only to within rounding. One model may be scaled.
    scale = case.get("scale", [1.0])[0]
    assert (run(name, tensors, case) - scale * tensors[0]).abs().max() <= 4 * 2.0**-24


@pytest.mark.parametrize("what", ["zeros", "one changes nothing", "opposite", "opposite task vectors"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_vectors_without_a_direction_or_of_opposite_ones_give_finite_numbers(name, case, what):
    tensors = inputs(name, case)
    if what == "zeros":
        tensors[:2] = [torch.zeros_like(t) for t in tensors[:2]]
    elif what == "one changes nothing":
        tensors[1:2] = tensors[:1] if len(tensors) > 1 else []
    elif what == "opposite":
        tensors[1:2] = [-tensors[0]] if len(tensors) > 1 else []
    else:
        tensors[2:] = [2 * tensors[0] - tensors[1]] if len(tensors) > 2 else []
    found = run(name, tensors, case)
    assert found.isfinite().all()
    # Lengths are kept, signs agree, or a part of a task vector is scaled to the length of the whole; singular vectors
    # are weighted alike. A division by a rounding error would give millions.
    assert found.abs().max() <= 16 * max(t.abs().max() for t in tensors)


@pytest.mark.parametrize(
    ("name", "case"), [c for c in CASES if c[0] not in RANDOM and (get(c[0]).max_inputs is None or BASE in c[1])]
)
def test_order_of_the_models_does_not_matter(name, case):
    tensors = inputs(name, case)
    first = has_base(name, case)
    order = [0, 2, 1] if first else [2, 0, 1]
    permuted = {k: [v[i - first] for i in order if i >= first] if isinstance(v, list) else v for k, v in case.items()}
    found = run(name, [tensors[i] for i in order], permuted)
    # Another order of three additions; in a matrix method of its sums as well.
    limit = tolerance(name) if get(name).matrix else 16 * 2.0**-24
    assert (found - run(name, tensors, case)).abs().max() <= limit


def test_slerp_from_the_other_end():
    a, b = inputs("slerp", {})
    assert torch.allclose(run("slerp", [a, b], {"t": 0.25}), run("slerp", [b, a], {"t": 0.75}), atol=1e-6)  # rounding
    found = run("nuslerp", [a, b], {"weight": [3, 1]})
    assert torch.allclose(found, run("slerp", [a, b], {"t": 0.25}), atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 0, 2)])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_empty_and_scalar_tensors(name, case, shape):
    tensors = inputs(name, case, shape)
    found = run(name, tensors, case)
    assert found.shape == shape
    if found.numel():
        assert (found - reference(name, tensors, case)).abs().max() <= tolerance(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_dtype_in_is_dtype_out(name, case, dtype):
    assert run(name, inputs(name, case, dtype=dtype), case).dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "case"), ELEMENTWISE)
def test_every_backend_gives_the_same_bytes(name, case, backend):
    tensors = [t + i * torch.rand(t.shape) for i, t in enumerate(inputs(name, case))]  # sums that do round
    assert torch.equal(run(name, tensors, case, backend=backend), run(name, tensors, case, backend="torch"))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_views_are_merged_as_their_copies(name, case):
    tensors = inputs(name, case)
    views = [torch.stack([t, -t], dim=-1)[..., 0].t() for t in tensors]
    assert torch.equal(run(name, views, case), run(name, [v.contiguous() for v in views], case))


@pytest.mark.parametrize(("name", "case"), CASES)
def test_inputs_are_not_changed(name, case):
    tensors = inputs(name, case)
    before = [t.clone() for t in tensors]
    run(name, tensors, case)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before))


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_unknown_and_missing_parameters_are_named(name):
    case = ARGUMENTS[name][0]
    with pytest.raises(ConfigError, match=r"parameters.nonsense: .* has no such parameter"):
        run(name, inputs(name, case), {**case, "nonsense": 1})
    for required in [p.name for p in get(name).params if p.required][:1]:
        with pytest.raises(ConfigError, match=f"parameters.{required}: missing"):
            run(name, inputs(name, case), {})


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.3, 1.0])
def test_breadcrumbs_keeps_the_elements_after_the_outliers_in_a_stable_sort(density, gamma):
    base, tuned = torch.zeros(10_000), inputs("ties", {}, (10_000,))[1]
    found = run("breadcrumbs", [base, tuned], {"weight": 1.0, "density": density, "gamma": gamma})
    count = int(density * 10_000)
    begin = min(int(gamma * 10_000), 10_000 - count)
    kept = torch.zeros(10_000, dtype=torch.bool)
    kept[torch.sort(tuned.abs(), descending=True, stable=True).indices[begin : begin + count]] = True
    assert torch.equal(found, torch.where(kept, tuned, 0.0))


def test_ties_keeps_exactly_the_elements_a_stable_sort_keeps():
    base, tuned = torch.zeros(10_000), inputs("ties", {}, (10_000,))[1]
    for density in (0.001, 0.1, 0.5, 0.9):
        found = run("ties", [base, tuned], {"weight": 1.0, "density": density})
        kept = torch.zeros(10_000, dtype=torch.bool)
        kept[torch.sort(tuned.abs(), descending=True, stable=True).indices[: int(density * 10_000)]] = True
        assert torch.equal(found, torch.where(kept, tuned, 0.0))


def test_della_keeps_larger_magnitudes_more_often_and_ranks_within_rows():
    """Every row has the magnitudes 1 to 500 times a size of its own; 2000 rows make a share per rank."""
    rows, n, density, epsilon = 2000, 500, 0.4, 0.3
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(rows, n, generator=generator).argsort(1).argsort(1)
    tuned = (ranks + 1.0) * 2.0 ** torch.randint(-9, 9, (rows, 1), generator=generator)
    case = {"weight": 1.0, "density": density, "epsilon": epsilon, "rescale": False}
    kept = run("della_linear", [torch.zeros(rows, n), tuned], case) != 0
    shares = torch.zeros(n).scatter_add_(0, ranks.reshape(-1), kept.float().reshape(-1)) / rows
    probability = density - epsilon + 2 * epsilon * torch.arange(n) / (n - 1)
    deviation = (probability * (1 - probability) / rows).sqrt()
    # Five standard deviations: one of 500 shares of independent draws lies beyond with a probability of 3e-4.
    assert ((shares - probability).abs() < 5 * deviation).all()
    # Their squares add up to a chi-squared variable of mean n and variance 2 n.
    assert abs(float(((shares - probability) / deviation).square().sum()) - n) < 5 * (2 * n) ** 0.5


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.1), (0.5, 0.5)])
def test_della_refuses_probabilities_beyond_0_and_1(density, epsilon):
    for name in ("della", "della_linear"):
        with pytest.raises(ConfigError, match=r"expected density - epsilon above 0 and density \+ epsilon below 1"):
            run(name, inputs(name, {}), {"weight": 1.0, "density": density, "epsilon": epsilon})
