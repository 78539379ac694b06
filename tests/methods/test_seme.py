"""The method `seme`: its formulas against float64, and the laws they imply."""

import math

import pytest
import torch

import seme
from seme.errors import CheckpointError, ConfigError
from seme.methods import Group, get
from seme.methods._matrix import Context, in_memory
from seme.methods.seme import reference
from seme.ops._op import Spec
from seme.roles import Role, TensorRole

OTHER = TensorRole(Role.OTHER)
READS = TensorRole(Role.READS, latent_axis="in")
WRITES = TensorRole(Role.WRITES, latent_axis="out")
# 129 x 31: tall, shares are formed; 9 x 70: wide, solved in the space of the rows.
SHAPES = [(40, 33), (33, 40), (129, 31), (9, 70), (1, 7), (5, 1), (64, 64)]
BACKENDS = ("torch", "cpu")


class Bases:
    """Semantic bases from given rows, as the method asks for them."""

    def __init__(self, rows: int, width: int):
        generator = torch.Generator().manual_seed(rows)
        self.rows = torch.nn.functional.normalize(torch.randn(rows, width, dtype=torch.float64, generator=generator))

    def matrix(self):
        return self.rows.float()

    def dual(self):
        return (self.rows @ torch.linalg.inv(self.rows.T @ self.rows)).float()


def tensors(shape, experts=3, dtype=torch.float32, seed=0):
    """A base and fine-tunes that moved in a few directions, with noise in the others."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, dtype=torch.float64, generator=generator)
    found = [base]
    for _ in range(experts):
        rank = max(1, shape[-1] // 4)
        step = torch.randn(*shape[:-1], rank, dtype=torch.float64, generator=generator)
        directions = torch.randn(*shape[:-2], rank, shape[-1], dtype=torch.float64, generator=generator)
        noise = 0.1 * torch.randn(shape, dtype=torch.float64, generator=generator)
        found.append(base + 0.01 * (step @ directions + noise))
    return [t.to(dtype) for t in found]


def merge(inputs, role=OTHER, bases=None, backend="auto", workspace=1 << 26, out_dtype=None, threads=1, **arguments):
    """The method on tensors in memory."""
    from seme import dtypes

    specs = tuple(Spec(tuple(t.shape), dtypes.from_torch(t.dtype)) for t in inputs)
    compute = dtypes.arithmetic(dtypes.promote([s.dtype for s in specs]))
    out = torch.full(inputs[0].shape, math.nan, dtype=out_dtype or inputs[0].dtype)
    group = Group("w", specs, 0, compute, dtypes.from_torch(out.dtype))
    context = Context(backend, "cpu", threads, workspace, (lambda: bases) if bases is not None else None)
    method = get("seme")
    given = {("lambda_" if p.name == "lambda" else p.name): p.default for p in method.params} | arguments
    if not isinstance(given["weight"], list):
        given["weight"] = [given["weight"]] * (len(inputs) - 1)
    method.merge(in_memory(group, role, inputs, out, context), **given)
    return out


def expected(inputs, role=OTHER, bases=None, **arguments):
    arguments.setdefault("weight", [1.0] * (len(inputs) - 1))
    return reference(inputs, base=0, role=role, bases=bases.rows if bases is not None else None, **arguments)


def moved(inputs):
    return max(float((t.double() - inputs[0].double()).abs().max()) for t in inputs[1:])


def close(found, wanted, inputs, condition=5e4):
    """Float32 sums, and what magnifies their rounding: a system whose condition is below width / rho, about 400 here,
    and the raising of small singular values, known through squares to (largest / smallest)^2 ulp. ``condition`` times
    an ulp of the largest change, and the rounding of the output."""
    size = float(inputs[0].double().abs().max())
    bound = condition * 2.0**-24 * moved(inputs) + 2.0**-23 * size
    assert float((found.double() - wanted).abs().max()) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_project_equals_its_reference(shape, backend):
    inputs = tensors(shape)
    close(merge(inputs, backend=backend), expected(inputs), inputs)
    for flatten in (0.0, 1.0):
        arguments = {"weight": [0.5, 2.0, 1.0], "lambda_": 0.7, "rho": 0.3, "flatten": flatten}
        condition = 5e5 if flatten else 1e3
        close(merge(inputs, backend=backend, **arguments), expected(inputs, **arguments), inputs, condition)


@pytest.mark.parametrize("axis", ["input", "latent"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("role", [READS, WRITES])
def test_axes_and_storage(role, transposed, axis):
    inputs = tensors((33, 40))
    role = TensorRole(role.role, transposed, 0, role.latent_axis)
    latent = (40 if role.latent_axis == "in" else 33) if not transposed else (33 if role.latent_axis == "in" else 40)
    bases = Bases(600, latent)
    for arguments in ({"axis": axis}, {"axis": axis, "sigma": 0.5, "select": 0.2}, {"rule": "elect", "select": 0.3}):
        close(merge(inputs, role, bases, **arguments), expected(inputs, role, bases, **arguments), inputs, 1e4)


@pytest.mark.parametrize("rho", [0.0, 0.1, 1.0])
def test_wide_matrices(rho):
    """Also with an expert that did not move, and with nothing but zeros."""
    inputs = tensors((9, 70), dtype=torch.float64)
    close(merge(inputs, rho=rho), expected(inputs, rho=rho), inputs)
    still = [*inputs, inputs[0]]
    close(merge(still, rho=rho), expected(still, rho=rho), still)
    assert torch.equal(merge([inputs[0]] * 3, rho=rho), inputs[0])


@pytest.mark.parametrize("shape", [(9, 70), (70, 9), (33, 33)])
def test_coherence_is_of_the_task_vectors_as_they_are(shape):
    """Experts of one direction and different lengths; in float64, so that what flattening depends on shows."""
    base, first, second = tensors(shape, experts=2, dtype=torch.float64)
    inputs = [base, first, base + 5 * (first - base) + (second - base), second]
    weight = [1.0, 0.5, 2.0]
    found, wanted = merge(inputs, weight=weight, flatten=1.0), expected(inputs, weight=weight, flatten=1.0)
    # 1e-6 of the change: rounding of 1e-16, raised by the cut at 1e-6 and squares.
    assert float((found - wanted).abs().max()) < 1e-6 * moved(inputs)


def test_directions_that_no_moment_has_go_to_the_base():
    """rho 0 and moments of few labels: the shares add up to the identity only where some expert has a share."""
    inputs, bases = tensors((40, 33), dtype=torch.float64), Bases(60, 33)
    arguments = {"rho": 0.0, "sigma": 1.0, "select": 0.05, "flatten": 0.0}
    found, wanted = merge(inputs, READS, bases, **arguments), expected(inputs, READS, bases, **arguments)
    # 1e-4 of the change: bases are float32, and the smallest kept eigenvalues divide by themselves.
    assert float((found - wanted).abs().max()) < 1e-4 * moved(inputs)


def test_elect_weighs_and_leaves_out():
    inputs, bases = tensors((40, 33)), Bases(530, 33)
    weight = [1.0, 0.1, 3.0]
    found = merge(inputs, READS, bases, rule="elect", weight=weight)
    close(found, expected(inputs, READS, bases, rule="elect", weight=weight), inputs, 1e4)
    assert not torch.allclose(found, merge(inputs, READS, bases, rule="elect"), atol=1e-4)
    without = merge(inputs[:3], READS, bases, rule="elect", weight=weight[:2])
    assert torch.equal(merge(inputs, READS, bases, rule="elect", weight=[*weight[:2], 0.0]), without)


@pytest.mark.parametrize("role", [OTHER, TensorRole(Role.VOCABULARY), TensorRole(Role.NORM)])
@pytest.mark.parametrize("size", [1e38, 1e-45, 1e300])
def test_only_ratios_of_weights_count(size, role):
    inputs = tensors((40, 33))
    assert torch.equal(merge(inputs, role, weight=[size, size, size]), merge(inputs, role))


def test_the_side_of_the_matrix_makes_a_difference():
    inputs = tensors((33, 40))
    assert not torch.allclose(merge(inputs, WRITES), merge(inputs, WRITES, axis="latent"), atol=1e-5)
    assert torch.equal(merge(inputs, READS), merge(inputs, READS, axis="latent"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("select", [0.05, 0.5, 1.0])
def test_elect_equals_its_reference(select, backend):
    inputs, bases = tensors((40, 33)), Bases(530, 33)
    found = merge(inputs, READS, bases, backend, rule="elect", select=select)
    wanted = expected(inputs, READS, bases, rule="elect", select=select)
    # A position whose variance or sum is as near to the threshold as float32 rounds may be kept or erased: it moves
    # few rows, by what it carries.
    rows = (found.double() - wanted).abs().amax(1)
    limit = 1e3 * 2.0**-24 * moved(inputs) + 2.0**-23 * float(inputs[0].abs().max())
    assert (rows > limit).sum() <= 2
    assert rows.max() <= 0.1 * moved(inputs)


def test_elect_without_a_latent_axis_works_on_raw_coordinates():
    inputs = tensors((12, 30))
    arguments = {"rule": "elect", "select": 0.4}
    close(merge(inputs, OTHER, **arguments), expected(inputs, OTHER, **arguments), inputs)


def test_one_expert_is_given_back():
    inputs = tensors((40, 33), experts=1)
    for arguments in ({}, {"rho": 0.0}, {"rule": "elect"}, {"sigma": 1.0}):
        # The base plus a difference is the expert to one rounding of each.
        assert (merge(inputs, READS, **arguments) - inputs[1]).abs().max() <= 2.0**-23 * inputs[1].abs().max()


@pytest.mark.parametrize("rho", [0.0, 0.1, 1.0])
def test_equal_experts_are_given_back(rho):
    # Without the identity the system may be singular, and float32 cannot tell its smallest directions from rounding.
    base, expert = tensors((40, 33), experts=1, dtype=torch.float32 if rho else torch.float64)
    close(merge([base, expert, expert, expert], rho=rho), expert.double(), [base, expert])


def test_an_expert_that_did_not_move_takes_part_through_rho_alone():
    base, a, b = tensors((40, 33), experts=2, dtype=torch.float64)
    still = [base, a, b, base]
    close(merge(still, rho=0.0), merge([base, a, b], rho=0.0), [base, a, b])
    close(merge(still, rho=0.5), expected(still, rho=0.5), [base, a, b])
    assert not torch.allclose(merge(still, rho=0.5), merge([base, a, b], rho=0.5), atol=1e-4)


def test_orthogonal_row_spaces_add_up():
    base = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    deltas = []
    for i in range(3):
        delta = torch.zeros(20, 12)
        delta[:, 4 * i : 4 * i + 4] = torch.randn(20, 4, generator=torch.Generator().manual_seed(i + 2)) * 0.01
        deltas.append(delta)
    inputs = [base, *(base + d for d in deltas)]
    close(merge(inputs, rho=0.0, flatten=0.0), (base + sum(deltas)).double(), inputs, 1e4)
    assert not torch.allclose(merge(inputs, rho=0.5, flatten=0.0), base + sum(deltas), atol=1e-4)


def test_flattening_keeps_the_norm_and_narrows_the_spectrum():
    inputs = tensors((40, 33), dtype=torch.float64)
    before = merge(inputs, flatten=0.0) - inputs[0]
    after = merge(inputs, flatten=1.0) - inputs[0]
    assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-9)
    spread = [torch.linalg.svdvals(t) for t in (before, after)]
    assert (spread[1] / spread[1][0])[-1] > 10 * (spread[0] / spread[0][0])[-1]
    left, right = [torch.linalg.svd(t)[0][:, :5] for t in (before, after)]
    assert torch.allclose((left.T @ right).abs(), torch.eye(5, dtype=torch.float64), atol=1e-6)  # the same directions


def test_rho_of_one_is_the_weighted_mean():
    inputs = tensors((40, 33))
    weight = [1.0, 2.0, 5.0]
    mean = inputs[0].double() + sum(w * (t.double() - inputs[0].double()) for w, t in zip(weight, inputs[1:])) / 8
    close(merge(inputs, weight=weight, rho=1.0, flatten=0.0), mean, inputs)


def test_order_of_the_experts_does_not_matter():
    inputs = tensors((40, 33))
    weight = [1.0, 2.0, 3.0]
    turned = [inputs[0], inputs[3], inputs[1], inputs[2]]
    close(merge(turned, weight=[3.0, 1.0, 2.0]), merge(inputs, weight=weight).double(), inputs)


def test_size_of_a_task_vector_does_not_change_its_shares():
    """W - W_0 of an expert scaled by 2 contributes twice as much, in the same directions."""
    inputs = tensors((40, 33), experts=2, dtype=torch.float64)
    base, a, b = inputs

    def linear(*models):
        return merge([base, *models], flatten=0.0)

    double = linear(base + 2 * (a - base), b)
    alone = [linear(x, y) for x, y in ((a, b), (base + 2 * (a - base), base + 2 * (b - base)))]
    # P_m depends on neither size, so the merge is linear in each task vector's size.
    assert torch.allclose(alone[1] - base, 2 * (alone[0] - base), atol=1e-12)
    change = double - alone[0]
    assert torch.allclose(linear(base + 3 * (a - base), b) - double, change, atol=1e-12)


@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype, experts):
    inputs = tensors((70, 33), experts=experts, dtype=dtype)
    found = merge(inputs, flatten=0.0)
    assert found.dtype == dtype
    wanted = expected(inputs, flatten=0.0)
    # One rounding at the store, half an ulp, after float32 (float64) arithmetic.
    ulp = torch.finfo(dtype).eps * wanted.abs()
    assert ((found.double() - wanted).abs() <= 0.51 * ulp + 1e3 * 2.0**-24 * moved(inputs)).all()


@pytest.mark.parametrize("rule", ["project", "elect"])
def test_row_chunks_and_threads(rule):
    """Smaller chunks change the order of sums of T^T T, not more: far below one part in 1e4 of the change."""
    inputs, bases = tensors((700, 33), dtype=torch.bfloat16), Bases(500, 33)
    whole = merge(inputs, READS, bases, out_dtype=torch.float32, rule=rule)
    for workspace, threads in ((1 << 16, 1), (1, 1), (1 << 16, 2)):
        found = merge(inputs, READS, bases, workspace=workspace, threads=threads, out_dtype=torch.float32, rule=rule)
        assert (found - whole).abs().max() <= 1e-4 * moved(inputs)
        again = merge(inputs, READS, bases, workspace=workspace, threads=threads, out_dtype=torch.float32, rule=rule)
        assert torch.equal(found, again)


def test_embeddings_are_merged_by_drift():
    inputs = tensors((50, 16))
    for t in inputs[1:]:
        t[7] = inputs[0][7]  # a token that nobody moved
    inputs[2][9] = inputs[0][9] + 1e-30  # squares that vanish in float32
    role = TensorRole(Role.VOCABULARY, latent_axis="in")
    found = merge(inputs, role, weight=[1.0, 2.0, 0.5], lambda_=0.9)
    close(found, expected(inputs, role, weight=[1.0, 2.0, 0.5], lambda_=0.9), inputs)
    assert torch.equal(found[7], inputs[0][7])


@pytest.mark.parametrize("role", [Role.NORM, Role.BIAS])
def test_vectors_are_averaged(role):
    inputs = tensors((1, 33))
    inputs = [t[0] for t in inputs]
    found = merge(inputs, TensorRole(role), weight=[1.0, 2.0, 1.0])
    close(found, expected(inputs, TensorRole(role), weight=[1.0, 2.0, 1.0]), inputs)


def test_stacked_experts_are_problems_of_their_own():
    inputs = tensors((3, 20, 16))
    for transposed in (False, True):
        role = TensorRole(Role.READS, transposed, 1, "in")
        found = merge(inputs, role)
        close(found, expected(inputs, role), inputs)
        for i in range(3):
            alone = merge([t[i].contiguous() for t in inputs], TensorRole(Role.READS, transposed, 0, "in"))
            assert torch.equal(found[i], alone)


def test_convolutions_are_flattened():
    inputs = tensors((8, 3, 5, 2))
    flat = merge([t.flatten(1) for t in inputs])
    assert torch.equal(merge(inputs).flatten(1), flat)


@pytest.mark.parametrize("size", [1e-30, 1e18, 1e25])
def test_any_finite_input_gives_a_finite_merge(size):
    inputs = [t * size for t in tensors((40, 33))]
    assert torch.isfinite(merge(inputs)).all()


def test_a_base_alone_and_weights_of_zero_give_the_base():
    inputs = tensors((40, 33))
    assert torch.equal(merge(inputs[:1]), inputs[0])
    assert torch.equal(merge(inputs, weight=[0.0] * 3), inputs[0])


@pytest.mark.parametrize("role", [OTHER, READS, TensorRole(Role.VOCABULARY), TensorRole(Role.NORM)])
def test_inputs_are_not_changed(role):
    inputs = tensors((40, 33))
    before = [t.clone() for t in inputs]
    for rule in ("project", "elect"):
        merge(inputs, role, Bases(300, 33), rule=rule)
    assert all(torch.equal(t, b) for t, b in zip(inputs, before))


def test_weights_of_zero_leave_an_expert_out():
    inputs = tensors((40, 33))
    close(merge(inputs, weight=[1.0, 1.0, 0.0]), merge(inputs[:3]).double(), inputs)


@pytest.mark.parametrize("shape", [(400, 48), (60, 48), (20, 48)])
def test_report_tells_what_was_kept(shape):
    """Shares from sketches, against their definition, in each of the three ways to solve the problem."""
    inputs = tensors(shape, experts=2, dtype=torch.float64)
    told = {}
    specs = tuple(Spec(tuple(t.shape), seme.dtypes.float64) for t in inputs)
    group = Group("w", specs, 0, seme.dtypes.float64, seme.dtypes.float64)
    context = Context("auto", "cpu", 1, report=lambda name, entry: told.update({name: entry}))
    out = torch.empty_like(inputs[0])
    get("seme").merge(in_memory(group, OTHER, inputs, out, context), weight=[1.0, 1.0], rho=0.1)
    deltas = [t - inputs[0] for t in inputs[1:]]
    moments = [t.T @ t / t.square().sum() for t in deltas]
    shares = [0.9 * 48 * m + 0.1 * torch.eye(48, dtype=torch.float64) for m in moments]
    inverse = torch.linalg.inv(sum(shares))
    for i in range(2):
        kept = float((deltas[i] @ shares[i] @ inverse).square().sum() / deltas[i].square().sum())
        # 32 sketches of about 12 directions each: a standard deviation of sqrt(2 / 32 / 12), some 7 %.
        assert told["w"]["kept"][i] == pytest.approx(kept, rel=0.25)
        assert told["w"]["norm"][i] == pytest.approx(float(deltas[i].norm()), rel=1e-6)
    cosine = float((moments[0] * moments[1]).sum() / moments[0].norm() / moments[1].norm())
    assert told["w"]["overlap"][0][1] == pytest.approx(cosine, rel=0.3)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rule": "projekt"}, r"parameters.rule: 'projekt'; expected one of project, elect, sequence"),
        ({"axis": "out"}, r"parameters.axis: 'out'; expected one of input, latent"),
        ({"rho": 1.5}, r"parameters.rho: 1.5; expected a number from 0 to 1"),
        ({"sigma": -0.1}, r"parameters.sigma: -0.1; expected a number from 0 to 1"),
        ({"select": 0}, r"parameters.select: 0.0; expected a number above 0, up to 1"),
        ({"weight": [1, -1]}, r"parameters.weight: -1.0; expected at least 0"),
    ],
)
def test_parameters_out_of_range_are_named(parameters, message):
    models = [{"w": torch.ones(4, 4)}] * 3
    with pytest.raises(ConfigError, match=message):
        seme.merge_state_dicts(models, "seme", base=0, parameters=parameters)


def test_elect_needs_a_head():
    models = [{"layers.0.q_proj.weight": torch.randn(4, 4)} for _ in range(3)]
    with pytest.raises(CheckpointError, match="head"):
        seme.merge_state_dicts(models, "seme", base=0, parameters={"rule": "elect"}, config={"hidden_size": 4})
