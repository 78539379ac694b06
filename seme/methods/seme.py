"""SeMe: merge layer by layer in the latent space. Select directions, compute shares, erase what belongs to others.

For the task vectors ``T_m = W_m - W_0`` of a weight [out, in], rule ``project`` (the default) does this:

- Select: ``M_m = T_m^T T_m / |T_m|^2``, the second moment of the input directions that expert m has learned to use.
  ``sigma`` mixes in the same moment rebuilt from the ``select`` share of vocabulary labels with the largest energy
  ``s_i^T M_m s_i`` on the semantic bases ``s_i``, where the inputs are the residual stream.
- Compute: ``C_m = weight_m ((1 - rho) in M_m + rho I)``, shares ``P_m = C_m (sum_k C_k)^-1``, which add up to I.
- Erase: ``W = W_0 + lambda sum_m T_m P_m``: what expert m would do to inputs that carry the others' semantics goes.
  This is the closed form of ``argmin_X sum_m |(X - T_m) C_m^(1/2)|^2``.
- Flatten: the merged task vector ``U S V^T`` becomes ``U S^q V^T`` of the same Frobenius norm. Here q is
  ``1 - flatten (1 - c)`` and c how far the task vectors agree: what only one expert knows is weaker than what all know.

Rule ``elect`` is FuseChat's select-calculate-erase in semantic coordinates ``z_m = T_m S^T``: weight each expert by its
energy in the ``select`` share of (row, label) positions with the largest variance over the experts, drop what disagrees
with the elected sign, recompose on the dual frame. Rule ``sequence`` merges the layers of a
running model one after the other on text that the experts generate, see :mod:`seme.semantics.sequence`.

Embeddings are merged row by row, by drift; norms and biases by weighted mean. The idea, the semantic bases and the
three steps are those of Gu et al. 2025, arXiv 2505.20144; its formulas of the steps are not public, those here are
this project's own. See ``docs/method.md``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

from seme.errors import ConfigError
from seme.methods._matrix import Matrix, Stack
from seme.methods._registry import AT_LEAST_0, FRACTION, Among, PerExpert, method
from seme.roles import Role, TensorRole

if TYPE_CHECKING:
    import torch

    from seme.checkpoint import Checkpoint

RULES = ("project", "elect", "sequence")
AXES = ("input", "latent")
KNOWN_RULE = Among(f"one of {', '.join(RULES)}", RULES.__contains__)
KNOWN_AXIS = Among(f"one of {', '.join(AXES)}", AXES.__contains__)
ABOVE_0 = Among("a number above 0, up to 1", lambda value: 0 < value <= 1)
BELOW_1 = Among("a number from 0 to below 1", lambda value: 0 <= value < 1)
AT_LEAST_1 = Among("at least 1", lambda value: value >= 1)
PROBES = 32
"""Random sign combinations of rows from which the report estimates shares and overlaps (see :func:`_Sketch`)."""
SMALLEST = 1e-6
"""Squared singular values are raised no more than those of this size, relative to the largest: below it float32
products have no digits."""
SHIFT = 15
"""log2 of the variance keys per bin of the first pass of ``elect``: 65536 bins over all float32."""


def reference(
    tensors: Sequence[torch.Tensor],
    *,
    base: int,
    weight: Sequence[float] = (),
    lambda_: float = 1.0,
    rho: float = 0.2,
    flatten: float = 0.4,
    sigma: float = 0.0,
    select: float = 0.1,
    rule: str = "project",
    axis: str = "input",
    role: TensorRole | None = None,
    bases: torch.Tensor | None = None,
    **of_sequence: float,
) -> torch.Tensor:
    """The formulas in float64 on whole matrices, with inverses and sorts as written.

    ``bases``: the rows s_i as unit vectors [v, d]. What only rule ``sequence`` has is accepted and ignored.
    """
    import torch

    role = role or TensorRole(Role.OTHER)
    origin = tensors[base].double()
    deltas = [t.double() - origin for i, t in enumerate(tensors) if i != base]
    batch = role.batch
    if origin.dim() - batch < 2 or role.role in (Role.NORM, Role.BIAS):
        return origin + lambda_ * sum((w * t for w, t in zip(weight, deltas)), start=0 * origin) / sum(weight)
    if role.role is Role.VOCABULARY:
        drift = torch.stack([w * t.square().sum(-1, keepdim=True) for w, t in zip(weight, deltas)])
        total = drift.sum(0)
        return origin + lambda_ * torch.where(total > 0, (drift * torch.stack(deltas)).sum(0) / total, 0.0)
    if batch:
        inner = TensorRole(role.role, role.transposed, 0, role.latent_axis, role.source)
        merged = []
        for i in range(origin.shape[0]):
            problem = [origin[i], *(origin[i] + t[i] for t in deltas)]
            one = reference(problem, base=0, weight=weight, lambda_=lambda_, rho=rho, flatten=flatten, sigma=sigma,
                            select=select, rule=rule, axis=axis, role=inner, bases=bases)  # fmt: skip
            merged.append(one)
        return torch.stack(merged)
    left = _left(role, rule, axis)
    flip = role.transposed != left
    problems = [t.flatten(1).t() if flip else t.flatten(1) for t in deltas]
    latent = role.latent_axis == ("out" if left else "in")
    frame = bases.double() if bases is not None and latent else None
    if rule == "elect":
        voting = [(t, w) for t, w in zip(problems, weight) if w > 0]
        found = _reference_elect([t for t, _ in voting], [w for _, w in voting], select, frame)
    else:
        found = _reference_project(problems, weight, rho, sigma, select, frame)
        found = _reference_flatten(found, [t for t, w in zip(problems, weight) if w > 0], flatten)
    return origin + lambda_ * (found.t() if flip else found).reshape(origin.shape)


def _reference_project(
    deltas: Sequence[torch.Tensor],
    weight: Sequence[float],
    rho: float,
    sigma: float,
    select: float,
    frame: torch.Tensor | None,
) -> torch.Tensor:
    import torch

    width = deltas[0].shape[1]
    identity = torch.eye(width, dtype=torch.float64)
    shares = []
    for w, delta in zip(weight, deltas):
        moment = delta.t() @ delta / delta.square().sum() if delta.any() else torch.zeros_like(identity)
        if sigma and frame is not None and delta.any():
            energy = ((frame @ moment) * frame).sum(1)
            kept = energy.argsort(descending=True, stable=True)[: max(1, int(select * len(energy)))]
            semantic = frame[kept].t() @ (energy[kept, None] * frame[kept])
            moment = (1 - sigma) * moment + sigma * semantic / semantic.trace()
        shares.append(w * ((1 - rho) * moment * width + rho * identity))
    inverse = torch.linalg.pinv(torch.stack(shares).sum(0), rtol=1e-10, hermitian=True)
    return torch.stack([t @ c @ inverse for t, c in zip(deltas, shares)]).sum(0)


def _reference_flatten(merged: torch.Tensor, deltas: Sequence[torch.Tensor], flatten: float) -> torch.Tensor:
    import torch

    moved = [t for t in deltas if t.any()]
    if len(moved) < 2:
        return merged
    whole = float(torch.stack(moved).sum(0).square().sum()) / sum(float(t.square().sum()) for t in moved)
    coherence = min(1.0, max(0.0, (whole - 1) / (len(moved) - 1)))
    u, s, v = torch.linalg.svd(merged, full_matrices=False)
    raised = torch.maximum(s, SMALLEST**0.5 * s.max()) ** (-flatten * (1 - coherence)) * s
    flat: torch.Tensor = (u * (raised * (s.norm() / raised.norm()))) @ v
    return flat


def _reference_elect(
    deltas: Sequence[torch.Tensor], weight: Sequence[float], select: float, frame: torch.Tensor | None
) -> torch.Tensor:
    import torch

    if frame is None:
        frame = torch.eye(deltas[0].shape[1], dtype=torch.float64)
    dual = frame @ torch.linalg.inv(frame.t() @ frame)
    z = torch.stack([t @ frame.t() for t in deltas])
    variance = z.var(0, unbiased=False)
    if select < 1:
        threshold = variance.flatten().sort(descending=True).values[max(1, int(select * variance.numel())) - 1]
        kept = variance >= threshold
    else:
        kept = torch.ones_like(variance, dtype=torch.bool)
    energy = (z.square() * kept).sum((1, 2)) * torch.tensor(list(weight), dtype=torch.float64)
    eta = (energy / energy.sum() if energy.sum() > 0 else energy).reshape(-1, 1, 1)
    sign = torch.where(z.sum(0) >= 0, 1.0, -1.0)
    agrees = z * sign > 0
    divisor = (eta * agrees).sum(0)
    merged: torch.Tensor = torch.where(divisor > 0, (eta * z * agrees).sum(0) / divisor, 0.0) @ dual
    return merged


def _left(role: TensorRole, rule: str, axis: str) -> bool:
    """True if the problem is posed on the output axis: where that is the residual stream, and it is asked for."""
    return role.latent_axis == "out" and (axis == "latent" or rule == "elect")


def describe(role: TensorRole, shape: tuple[int, ...], arguments: Mapping[str, Any]) -> str:
    """What is done with a tensor, for the plan and the report."""
    if len(shape) - role.batch < 2 or role.role in (Role.NORM, Role.BIAS):
        return "mean"
    if role.role is Role.VOCABULARY:
        return "drift"
    rule, axis = arguments["rule"], arguments["axis"]
    return f"{rule} on outputs" if _left(role, rule, axis) else rule


def workspace(role: TensorRole, shape: tuple[int, ...], experts: int, arguments: Mapping[str, Any]) -> int:
    """Bytes of the matrices that are held for one tensor, besides rows: see :func:`_project`."""
    if describe(role, shape, arguments) in ("mean", "drift"):
        return 0
    rows, columns = shape[role.batch], prod(shape[role.batch + 1 :])
    flipped = role.transposed != _left(role, arguments["rule"], arguments["axis"])
    out, width = (columns, rows) if flipped else (rows, columns)
    whole = (experts + 2) * 4 * out * width if flipped else 0
    if experts * out < width and describe(role, shape, arguments).startswith("project"):
        rows = experts * out
        return whole + 4 * (rows * width + 3 * rows * rows + out * width)
    tall = experts * width <= out
    square = max((experts + 2 if tall else 3) * width**2, 5 * min(out, width) ** 2)  # sums and solve, then eigenvectors
    return whole + 4 * (square + out * width)


def uses_bases(arguments: Mapping[str, Any]) -> bool:
    """True if these parameters need the semantic bases of the base model."""
    return bool(arguments["rule"] == "elect" or arguments["sigma"] > 0)


def asks_for_whole(arguments: Mapping[str, Mapping[str, Any]]) -> bool:
    """True if the rule is ``sequence``; it, and what belongs to it, must be the same for every tensor.

    Raises:
        ConfigError: they are not.
    """
    if not any(a["rule"] == "sequence" for a in arguments.values()):
        return False
    for name in ("rule", "rho", "trust", "keep", "probes", "seed"):
        values = {a[name] for a in arguments.values()}
        if len(values) > 1:
            shown = ", ".join(map(str, sorted(values)))
            raise ConfigError(f"parameters.{name}: rule sequence needs one value for all tensors, found {shown}")
    return True


def merge_whole(
    checkpoints: Sequence[Checkpoint],
    arguments: Mapping[str, Mapping[str, Any]],
    emit: Callable[[str, torch.Tensor], None],
    data_free: Callable[[str], torch.Tensor],
) -> dict[str, Any]:
    """Rule ``sequence``.

    Args:
        checkpoints: the base, then the experts.
        arguments: the method's parameters by tensor.
        emit: takes each merged tensor.
        data_free: gives what rule ``project`` makes of a tensor, float32.

    Returns:
        What the merge report says about it.
    """
    from seme.semantics.sequence import Probes, Settings, merge_sequence

    first = next(iter(arguments.values()))
    none = [0.0] * (len(checkpoints) - 1)
    settings = Settings(
        weight=lambda name: arguments[name]["weight"] if name in arguments else none,
        scale=lambda name: arguments[name]["lambda_"] if name in arguments else 1.0,
        trust=first["trust"],
        keep=first["keep"],
        rho=max(first["rho"], 1e-3),
        probes=Probes(count=first["probes"], seed=first["seed"]),
    )
    report = merge_sequence(checkpoints, settings, emit, data_free)
    return {"tokens": report.tokens, "moved": dict(report.moved)}


@method(
    "seme",
    reference=reference,
    source="https://arxiv.org/abs/2505.20144",
    matrix=True,
    describe=describe,
    workspace=workspace,
    uses_bases=uses_bases,
    whole=merge_whole,
    asks_for_whole=asks_for_whole,
)
def merge(
    stack: Stack,
    *,
    weight: Annotated[PerExpert, AT_LEAST_0] = 1.0,  # type: ignore[assignment]
    lambda_: float = 1.0,
    rho: Annotated[float, FRACTION] = 0.2,
    flatten: Annotated[float, FRACTION] = 0.4,
    sigma: Annotated[float, FRACTION] = 0.0,
    select: Annotated[float, ABOVE_0] = 0.1,
    rule: Annotated[str, KNOWN_RULE] = "project",
    axis: Annotated[str, KNOWN_AXIS] = "input",
    trust: Annotated[float, BELOW_1] = 0.95,
    keep: Annotated[float, AT_LEAST_0] = 0.0,
    probes: Annotated[int, AT_LEAST_1] = 6,
    seed: int = 0,
) -> None:
    """Merge one tensor; of rule ``sequence`` this is the part without text, rule ``project``.

    Args:
        weight: how much the model counts where the models want different things; not negative.
        lambda: scale of the merged task vector.
        rho: share of the identity in each model's moment, from 0 to 1; at 1 the shares are those of the weighted mean.
        flatten: how much of the spread of the merged task vector's singular values is taken away where the models
            disagree, from 0 to 1.
        sigma: share of the moment that is rebuilt from the selected vocabulary labels, from 0 to 1.
        select: share of labels (project) or of positions (elect) that is selected.
        rule: project, elect, or sequence (runs the models; needs transformers).
        axis: input, or latent: matrices that write the residual stream are merged on that side.
        trust: (sequence) share of what the generated text says against rule project, from 0 to below 1.
        keep: (sequence) weight of the base as an expert of its own, so that less of it is forgotten; not negative.
        probes: (sequence) batches of 16 texts that each model writes, of 128 tokens or what all have positions for.
        seed: (sequence) of the random numbers that the text is drawn with.
    """
    what = describe(stack.role, stack.shape, {"rule": rule, "axis": axis})
    largest = max(weight, default=0)
    if largest > 0:  # only their ratios count; so no product with one overflows
        weight = [w / largest for w in weight]
    if what == "mean" or sum(w > 0 for w in weight) < 2:  # one expert has all shares, whatever the rule
        stack.mean(weight, lambda_)
    elif what == "drift":
        _drift(stack, weight, lambda_)
    else:
        for matrix in stack.matrices(left=_left(stack.role, rule, axis)):
            if rule == "elect":
                _elect(matrix, weight, lambda_, select)
            elif not _is_wide(matrix, rho, sigma) or not _project_wide(matrix, weight, lambda_, rho, flatten):
                _project(matrix, weight, lambda_, rho, flatten, sigma, select)


def _drift(stack: Stack, weight: Sequence[float], scale: float) -> None:
    """Rows of an embedding: each expert's task vector weighted by its squared length in that row."""
    import torch

    rows, width = stack.shape[0], prod(stack.shape[1:])
    step = max(1, (1 << 20) // max(width, 1))
    base_index = stack.group.base
    assert base_index is not None
    for start in range(0, rows, step):
        span = (start * width, min(start + step, rows) * width)
        base = stack.load(base_index, *span).to(stack.arithmetic).view(-1, width)
        deltas = [stack.load(m, *span).to(base.dtype).view(-1, width) - base for m in stack.group.experts]
        lengths = torch.stack([torch.linalg.vector_norm(t, dim=1, dtype=torch.float64) for t in deltas])
        longest = lengths.max(0).values
        # Relative to the longest, so that no square overflows or vanishes.
        energy = (lengths / torch.where(longest > 0, longest, 1.0)).square()
        energy = energy * torch.tensor(list(weight), dtype=torch.float64, device=base.device)[:, None]
        total = energy.sum(0)
        shares = (energy / torch.where(total > 0, total, 1.0)).to(base.dtype)
        for share, delta in zip(shares, deltas):
            base = base + scale * share[:, None] * delta
        stack.store(span[0], base.to(stack.out_dtype).view(-1))


class _Sketch:
    """``signs @ T_m`` for PROBES rows of random signs: enough for the report's shares and overlaps.

    For any matrix A, the mean of ``|y A|^2`` over the rows y of ``signs @ T`` is ``|T A|^2`` in expectation, and
    nearly so for few rows because T has many directions (Hutchinson's estimator).
    """

    def __init__(self, matrix: Matrix) -> None:
        import torch

        generator = torch.Generator().manual_seed(zlib.crc32(matrix.name.encode()))
        signs = torch.randint(0, 2, (PROBES, matrix.out), generator=generator, dtype=torch.int8)
        self.signs = (signs * 2 - 1).to(matrix.stack.context.device)
        self.rows = matrix.zeros(PROBES, matrix.width)

    def add(self, where: slice, base: torch.Tensor, tensor: torch.Tensor) -> None:
        dtype = self.rows.dtype
        self.rows += self.signs[:, where].to(dtype) @ (tensor.to(dtype) - base.to(dtype))


def _project(
    matrix: Matrix, weight: Sequence[float], scale: float, rho: float, flatten: float, sigma: float, select: float
) -> None:
    """Rule ``project``: ``sum_m T_m P_m``, as ``T_r + sum_m (T_m - T_r) P_m`` for one expert r, as the P_m add up to I.

    ``sum_m (T_m - T_r) C_m`` is summed up, and one system solved for it: two matrices in x in and one out x in are
    held, whatever the number of experts. With many more rows than columns it costs less to solve for the shares P_m
    and to sum up with them (n + 2 matrices in x in); without flattening no matrix out x in is held then.
    """
    import torch

    from seme.ops.delta_gram import delta_gram
    from seme.ops.delta_project import delta_project
    from seme.ops.project_erase import project_erase

    stack = matrix.stack
    experts, options = stack.group.experts, stack.context.options()
    exponent = 1 - flatten * (1 - _coherence(_inner_products(matrix), weight)) if flatten else 1.0
    tall = len(experts) * matrix.width <= matrix.out
    # Where the sum of all C_k may be singular the shares add up to less than I; T_r is zero for the base.
    exact = rho < 1e-3
    origin = stack.group.base if exact else max(m for m, w in zip(experts, weight) if w > 0)
    assert origin is not None
    total = matrix.zeros(matrix.width, matrix.width)
    moments: list[torch.Tensor] = []
    merged = matrix.zeros(0 if tall else matrix.out, matrix.width)
    entry = _Entry(matrix, len(experts)) if stack.context.report else None

    def add_up(expert: int, factor: torch.Tensor) -> None:
        for where, start, (tensor,) in matrix.stream(expert, base=origin):
            delta_project(start, tensor, factor, out=merged[where], **options)

    for m, (expert, w) in enumerate(zip(experts, weight)):
        moment = matrix.zeros(matrix.width, matrix.width)
        for where, base, (tensor,) in matrix.stream(expert):
            delta_gram(base, tensor, out=moment, mirror=where.stop == matrix.out, **options)
            if entry:
                entry.sketches[m].add(where, base, tensor)
        energy = float(moment.diagonal().sum())
        if entry:
            entry.seen(m, moment, energy)
        _select(matrix, moment, energy, sigma, select)
        moment *= w * (1 - rho) * matrix.width
        moment.diagonal().add_(w * rho)
        total += moment
        if entry:
            entry.moved[m] = entry.sketches[m].rows @ moment
        if tall:
            moments.append(moment)
        elif expert != origin:
            add_up(expert, moment)
        del moment
    solve = _Solver(total, exact)
    if entry:
        entry.finish(solve(torch.cat(entry.moved)).chunk(len(experts)))
    if tall and exponent == 1:
        shares = [solve(moment) for moment in moments]
        for where, base, tensors in matrix.stream(*experts):
            out = project_erase(base, tensors, shares, scale=scale, out_dtype=stack.out_dtype, **options)
            matrix.put(where, out)
        return
    if tall:
        merged = matrix.zeros(matrix.out, matrix.width)
        for expert, moment in zip(experts, moments):
            if expert != origin:
                add_up(expert, solve(moment))
    else:
        for where in matrix.ranges(1):
            merged[where] = solve(merged[where])
    del total, solve, moments
    if origin != stack.group.base:
        for where, base, (tensor,) in matrix.stream(origin):
            merged[where] += tensor.to(merged.dtype) - base.to(merged.dtype)
    _raise(merged, exponent)
    matrix.add(merged, scale)


def _inner_products(matrix: Matrix) -> torch.Tensor:
    """``<T_m, T_k>`` of all experts, [n, n] float64."""
    import torch

    experts = matrix.stack.group.experts
    found = torch.zeros(len(experts), len(experts), dtype=torch.float64, device=matrix.stack.context.device)
    for where, base, tensors in matrix.stream(*experts):
        deltas = matrix.zeros(len(experts), where.stop - where.start, matrix.width)
        origin = base.to(deltas.dtype)
        for delta, tensor in zip(deltas, tensors):
            torch.sub(tensor.to(deltas.dtype), origin, out=delta)
        by_row = deltas.transpose(0, 1)
        found += (by_row @ by_row.mT).sum(0, dtype=torch.float64)
    return found


def _coherence(inner: torch.Tensor, weight: Sequence[float]) -> float:
    """How far the n task vectors that have a weight and are not zero agree: 0 if they are orthogonal, 1 if equal.

    ``(|sum_m T_m|^2 / sum_m |T_m|^2 - 1) / (n - 1)``, from their inner products. 1 for fewer than two, and where
    squares overflow.
    """
    counted = [m for m, w in enumerate(weight) if w > 0 and float(inner[m, m]) != 0]
    chosen = inner[counted][:, counted]
    alone = float(chosen.diagonal().sum())
    if len(counted) < 2 or not 1e-30 < alone < 1e30:
        return 1.0
    return min(1.0, max(0.0, (float(chosen.sum()) / alone - 1) / (len(counted) - 1)))


def _raise(delta: torch.Tensor, exponent: float) -> None:
    """``U S V^T`` to ``U S^q V^T`` of the same Frobenius norm, in place, by eigenvectors of the smaller Gram matrix."""
    import torch

    from seme.ops._matrix import add_upper, mirror_upper, tile_rows, tiles

    if exponent == 1:
        return
    rows, columns = delta.shape
    side = delta if columns <= rows else delta.T
    gram = delta.new_zeros(side.shape[1], side.shape[1])
    add_upper(side, side, gram)
    mirror_upper(gram)
    if not 1e-30 < float(gram.diagonal().sum()) < 1e30:
        return
    values, vectors = torch.linalg.eigh(gram)
    factor = torch.maximum(values, SMALLEST * values[-1]) ** ((exponent - 1) / 2)
    values.clamp_(min=0)
    factor *= (values.sum() / (values * factor.square()).sum()).sqrt()
    power = (vectors * factor) @ vectors.mT
    for part in tiles(len(side), tile_rows(len(power))):
        if columns <= rows:
            delta[part] = delta[part] @ power
        else:
            delta[:, part] = power @ delta[:, part]


def _is_wide(matrix: Matrix, rho: float, sigma: float) -> bool:
    """True if the rows of all task vectors together are fewer than the columns, and the moments are theirs alone."""
    fewer = len(matrix.stack.group.experts) * matrix.out < matrix.width
    return fewer and rho < 1 and (sigma == 0 or not matrix.latent)


def _project_wide(matrix: Matrix, weight: Sequence[float], scale: float, rho: float, flatten: float) -> bool:
    """Rule ``project`` for a matrix with few rows, in the space that they span: no matrix in x in is formed.

    With U the task vectors below one another, each times ``sqrt(a_m)``, ``a_m = weight_m (1 - rho) in / |T_m|^2``, and
    b the sum of all ``weight_m rho``: ``sum_k C_k = U^T U + b I`` and ``sum_m T_m C_m = Q U``, so that the solution is
    ``Q U (U^T U + b I)^-1 = Q (U U^T + b I)^-1 U``, a system of the size of the rows.

    Returns:
        False if a task vector is too large or too small for it; nothing is written then.
    """
    import torch

    from seme.ops._matrix import add_upper, mirror_upper

    stack, out = matrix.stack, matrix.out
    experts = stack.group.experts
    stacked = matrix.zeros(len(experts) * out, matrix.width)
    blocks = [slice(m * out, (m + 1) * out) for m in range(len(experts))]
    entry = _Entry(matrix, len(experts)) if stack.context.report else None
    roots = []
    for m, (expert, w) in enumerate(zip(experts, weight)):
        delta = stacked[blocks[m]]
        for where, base, (tensor,) in matrix.stream(expert):
            torch.sub(tensor.to(delta.dtype), base.to(delta.dtype), out=delta[where])
        norm = float((delta[:, None] @ delta[:, :, None]).sum(dtype=torch.float64)) ** 0.5
        if not 1e-15 < norm < 1e15 and delta.any():
            return False
        if entry:
            entry.energy[m] = norm**2
            entry.sketches[m].rows = entry.sketches[m].signs.to(delta.dtype) @ delta
        roots.append((w * (1 - rho) * matrix.width) ** 0.5 / norm if norm else 0.0)
        delta *= roots[m]
    gram = matrix.zeros(len(stacked), len(stacked))
    add_upper(stacked.T, stacked.T, gram)
    mirror_upper(gram)
    mixed = matrix.zeros(out, len(stacked))  # Q
    for block, root, w in zip(blocks, roots, weight):
        if root:
            mixed[:, block] = gram[block, block] / root
            mixed[:, block].diagonal().add_(w * rho / root)
    if entry:
        entry.overlaps([[float(gram[a, b].square().sum()) for b in blocks] for a in blocks])
    scales = torch.tensor([1 / r if r else 0.0 for r in roots], dtype=torch.float64)
    traces = torch.tensor([[float(gram[a, b].diagonal().sum()) for b in blocks] for a in blocks], dtype=torch.float64)
    coherence = _coherence(scales[:, None] * traces * scales, weight)
    gram.diagonal().add_(sum(weight) * rho)
    solve = _Solver(gram, exact=rho < 1e-3)
    if entry:
        moved = matrix.zeros(len(experts) * PROBES, len(stacked))
        for m, block in enumerate(blocks):
            moved[m * PROBES : (m + 1) * PROBES, block] = entry.sketches[m].signs.to(moved.dtype) @ mixed[:, block]
        entry.finish((solve(moved) @ stacked).chunk(len(experts)))
    merged = solve(mixed) @ stacked
    _raise(merged, 1 - flatten * (1 - coherence))
    matrix.add(merged, scale)
    return True


def _select(matrix: Matrix, moment: torch.Tensor, energy: float, sigma: float, select: float) -> None:
    """Turn ``T^T T`` into M in place: trace 1, and of it ``sigma`` from the selected labels."""
    from math import isfinite

    from seme.ops.semantic_energy import semantic_energy
    from seme.ops.weighted_gram import weighted_gram

    if energy == 0:
        return
    if not isfinite(energy) or energy < 1e-30:  # squares overflow or vanish: no direction is preferred
        moment.zero_()
        moment.diagonal().fill_(1 / matrix.width)
        return
    moment /= energy
    if sigma == 0 or not matrix.latent:
        return
    options = matrix.stack.context.options()
    frame = matrix.stack.context.frame
    energies = semantic_energy(frame, moment, **options)
    count = max(1, int(select * len(energies)))
    kept = energies.sort(descending=True, stable=True).indices[:count]
    weights = energies.new_zeros(len(energies))
    weights[kept] = energies[kept]
    semantic = weighted_gram(frame, weights, **options)
    trace = float(semantic.diagonal().sum())
    if trace > 0:
        moment *= 1 - sigma
        moment += semantic.to(moment.dtype) * (sigma / trace)


class _Solver:
    """``x -> x S^-1`` for the symmetric S = sum of all C_k, row by row."""

    def __init__(self, total: torch.Tensor, exact: bool) -> None:
        """``exact``: S may be singular, so its pseudo-inverse is formed in float64."""
        import torch

        self.factor, failed = torch.linalg.cholesky_ex(total)
        self.inverse: torch.Tensor | None = None
        if exact or int(failed):
            # Below this an eigenvalue is what rounding left of zero.
            cut = total.shape[0] * torch.finfo(total.dtype).eps
            self.inverse = torch.linalg.pinv(total.double(), rtol=cut, hermitian=True).to(total.dtype)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        import torch

        if self.inverse is not None:
            return rows @ self.inverse
        half = torch.linalg.solve_triangular(self.factor.mT, rows, upper=True, left=False)
        solved: torch.Tensor = torch.linalg.solve_triangular(self.factor, half, upper=False, left=False)
        return solved


class _Entry:
    """What the merge report tells of one matrix: shares kept, overlap of the experts, sketches for the labels."""

    def __init__(self, matrix: Matrix, experts: int) -> None:
        self.matrix = matrix
        self.sketches = [_Sketch(matrix) for _ in range(experts)]
        self.moved: list[torch.Tensor] = [self.sketches[0].rows] * experts
        self.energy = [0.0] * experts
        self.size = [0.0] * experts
        self.overlap = [[1.0 if i == j else 0.0 for j in range(experts)] for i in range(experts)]

    def seen(self, m: int, gram: torch.Tensor, energy: float) -> None:
        """Take the Gram matrix of expert m while it is there."""
        self.energy[m] = energy
        self.size[m] = float(gram.norm())
        for k in range(m):
            # mean of y^T G_m y over the sketch's rows y is trace(G_m G_k).
            rows = self.sketches[k].rows
            inner = float(((rows @ gram) * rows).sum(1).mean())
            scale = self.size[m] * self.size[k]
            self.overlap[m][k] = self.overlap[k][m] = min(1.0, inner / scale) if scale > 0 else 0.0

    def overlaps(self, products: list[list[float]]) -> None:
        """Take all ``trace(G_i G_j)``, of Gram matrices of any scale, where they are known exactly."""
        for i, row in enumerate(products):
            for j, inner in enumerate(row):
                scale = (products[i][i] * products[j][j]) ** 0.5
                self.overlap[i][j] = inner / scale if scale > 0 else float(i == j)

    def finish(self, projected: Sequence[torch.Tensor]) -> None:
        """Report; ``projected`` are the sketches times P_m."""
        kept = []
        for sketch, moved in zip(self.sketches, projected):
            whole = float(sketch.rows.square().sum())
            kept.append(float(moved.square().sum()) / whole if whole > 0 else None)
        stack = self.matrix.stack
        assert stack.context.report is not None
        rows = [s.rows.cpu() for s in self.sketches] if self.matrix.latent else None
        stack.context.report(
            stack.group.name,
            {"norm": [e**0.5 for e in self.energy], "kept": kept, "overlap": self.overlap, "rows": rows},
        )


def _elect(matrix: Matrix, weight: Sequence[float], scale: float, select: float) -> None:
    """Rule ``elect``: two passes that select (coarse, then exact), one that elects, erases and recomposes.

    As in FuseChat's own code the selection decides the weights alone, and all positions are merged.
    """
    import torch

    from seme.ops.elect import elect
    from seme.ops.elect_select import elect_select

    stack = matrix.stack
    options = stack.context.options()
    experts, weight = zip(*((m, w) for m, w in zip(stack.group.experts, weight) if w > 0))
    if matrix.latent:
        frame, dual = stack.context.frame, stack.context.dual
    else:
        frame = dual = torch.eye(matrix.width, device=stack.context.device)
    wanted = max(1, int(select * matrix.out * len(frame)))
    lowest, shift = 0, SHIFT
    while True:
        totals = None
        for _, base, tensors in matrix.stream(*experts):
            totals = elect_select(base, tensors, frame, lowest=lowest, shift=shift, out=totals, **options)
        assert totals is not None
        counts, sums = totals
        bin_, energies = _threshold(counts, sums, wanted, select)
        if shift == 0 or select >= 1:
            break
        lowest, shift = lowest + (bin_ << shift), 0
    etas = [float(e) * w for e, w in zip(energies, weight)]
    whole = sum(etas)
    if whole > 0:
        etas = [e / whole for e in etas]
    for where, base, tensors in matrix.stream(*experts):
        out = elect(
            base,
            tensors,
            frame,
            dual,
            threshold=0,
            etas=etas,
            scale=scale,
            out_dtype=stack.out_dtype,
            **options,
        )
        matrix.put(where, out)


def _threshold(counts: torch.Tensor, sums: torch.Tensor, wanted: int, select: float) -> tuple[int, torch.Tensor]:
    """The bin that holds the ``wanted``-th largest variance, and each expert's energy from that bin on."""
    bins = counts.shape[0] - 2
    if select >= 1:
        return 0, sums.sum(1)
    beyond = counts[bins : bins + 1]
    above = beyond + counts[:bins].flip(0).cumsum(0)
    reached = (above >= wanted).nonzero()
    bin_ = bins - 1 - int(reached[0]) if len(reached) else 0
    return bin_, sums[:, bins] + sums[:, bin_:bins].sum(1)
