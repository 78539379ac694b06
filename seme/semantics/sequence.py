"""Rule ``sequence``: linear maps fitted one after the other, in the order in which they run.

Each expert ``m`` writes its own probes: text from one random first token on. A linear map gets the inputs ``X_m``
[in, tokens] in expert m and ``X~_m`` in the model merged so far, both on the text of m, and becomes::

    argmin_W  a sum_m w_m s_m ||W X~_m - Y_m||^2  +  (1 - a) tr (W - W_d) R (W - W_d)^T
    W = W_d + a [sum_m w_m s_m (Y_m - W_d X~_m) X~_m^T] [a sum_m w_m s_m X~_m X~_m^T + (1 - a) R]^-1

with ``s_m = in / ||X_m||^2``; ``W_d`` the data-free answer, rule ``project``; ``R = sum_m w_m ((1 - rho) in T_m^T T_m /
||T_m||^2 + rho I)`` the metric that rule ``project`` solves in, scaled to the mean diagonal of the first term. The
target ``Y_m`` is ``W_m X_m``; of a map that adds to the residual stream h it is ``W_m X_m + h_m - h~_m``, so that it
also makes up for what the stream of the merged model lacks by then.

It extends RegMean (Jin et al. 2023, arXiv 2212.09849: real inputs, ``X~ = X``) by two ideas of post-training
quantisation: the inputs are those of the model as merged so far, and the text is written by the models themselves
(LLM-QAT, Liu et al. 2023, arXiv 2305.17888). The residual target and the prior are our own. No data and no training:
every step is a closed form.

Memory: all of one expert, with the keys and values of its text, while it writes; afterwards one layer of base, experts
and result in float32, activations of ``2 n count batch length d`` floats, and matrices of in x in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from seme.checkpoint.reader import Checkpoint
from seme.errors import CheckpointError, ConfigError
from seme.roles import hidden_size, layers, number
from seme.semantics.skeleton import Maps, Skeleton, is_transposed

if TYPE_CHECKING:
    import torch

    # Input in the expert and in the result, and what the result's residual stream lacks; [tokens, ...] each.
    Pair = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]

ROWS = 4096  # rows of a weight that are solved for at once


@dataclass(frozen=True)
class Probes:
    """What each expert writes: ``count`` batches of ``batch`` sequences of ``length`` tokens.

    Attributes:
        count: batches.
        batch: sequences of a batch, which run through a layer together.
        length: tokens of a sequence; fewer if one of the models has fewer positions.
        temperature: the logits are divided by it before a token is drawn.
        seed: of the random numbers. Every expert gets the same ones, so the order of the experts does not matter.
    """

    count: int = 6
    batch: int = 16
    length: int = 128
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "batch", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"probes.{name}: {getattr(self, name)}; expected at least 1")
        if not self.temperature > 0:
            raise ConfigError(f"probes.temperature: {self.temperature}; expected more than 0")


def writing_memory(checkpoint: Checkpoint, probes: Probes) -> int:
    """About how many bytes a model takes while it writes: its weights, and keys and values of all rows.

    ``config.json`` says how wide keys and values are; without a number there they are as wide as the stream.
    """
    embeddings = [t for t in checkpoint.tensors.values() if "emb" in t.name or "wte" in t.name]
    first = next(iter(embeddings or checkpoint.tensors.values()))
    itemsize = 2 if first.dtype.itemsize == 2 else 4
    weights = sum(t.numel for t in checkpoint.tensors.values())
    shapes = {name: t.shape for name, t in checkpoint.tensors.items()}
    config = checkpoint.config
    width = hidden_size(config, shapes)
    heads = number(config, ("num_attention_heads", "n_head", "n_heads", "num_heads")) or 1
    groups = number(config, ("num_key_value_heads", "num_kv_heads")) or heads
    head = number(config, ("head_dim",)) or width // heads
    depth = max(layers(shapes).values(), default=0)
    return itemsize * (weights + 2 * depth * probes.count * probes.batch * probes.length * groups * head)


@dataclass(frozen=True)
class Settings:
    """Parameters of the merge.

    Attributes:
        weight: by the name of a tensor, the weight of each expert, not negative.
        scale: by the name of a tensor, ``lambda``: it becomes ``W_0 + lambda (W - W_0)``.
        trust: ``a``, the share of what the probes say; 0 gives the data-free answer.
        keep: weight of the base, which then writes probes and is fitted as an expert would be, so that the result
            forgets less of what the base can.
        rho: share of the identity in the metric, as in rule ``project``.
        probes: what the experts write.
    """

    weight: Callable[[str], Sequence[float]]
    scale: Callable[[str], float] = lambda name: 1.0
    trust: float = 0.95
    keep: float = 0.0
    rho: float = 0.1
    probes: Probes = field(default_factory=Probes)

    def __post_init__(self) -> None:
        if not 0 <= self.trust < 1:
            raise ConfigError(f"trust: {self.trust}; expected at least 0 and less than 1")
        if not 0 <= self.keep < float("inf"):
            raise ConfigError(f"keep: {self.keep}; expected at least 0")
        if not 0 < self.rho <= 1:
            raise ConfigError(f"rho: {self.rho}; expected more than 0 and at most 1")


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        moved: by tensor, ``||W - W_d|| / ||W_d - W_0||``: how far the probes moved it from the data-free answer.
        tokens: tokens that each expert wrote.
        writing: wall time of writing them, seconds.
        seconds: wall time of everything.
    """

    moved: Mapping[str, float]
    tokens: int
    writing: float
    seconds: float


@dataclass
class _Stream:
    """The text of one model, and what runs along the layers for it in that model and in the result; by batch."""

    model: Skeleton
    ids: list[torch.Tensor]
    own: list[torch.Tensor]
    merged: list[torch.Tensor]


def merge_sequence(
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    emit: Callable[[str, torch.Tensor], None],
    data_free: Callable[[str], torch.Tensor],
) -> Report:
    """Merge checkpoints of decoders that transformers can run.

    The same bytes for the same inputs on one machine with the same number of threads.

    Args:
        checkpoints: the base, then the experts.
        settings: weights, lambda, probes.
        emit: called once for each tensor of the base's checkpoint, in the order in which the layers run, with the
            merged tensor, float32 unless ``data_free`` gave it otherwise.
        data_free: the answer of rule ``project`` for a tensor, lambda included, float32. Embeddings, norms, biases, a
            tied head, and tensors that transformers does not know stay what it says.

    Raises:
        CheckpointError: transformers cannot run the model, or its layers are not made of linear maps and vectors
            (mixtures of experts), or activations are not finite.
        ConfigError: a weight is negative, or there are not as many as experts.
        SemeError: transformers is not installed.
    """
    import torch

    with torch.no_grad():
        return _Merge(checkpoints, settings, emit, data_free).run()


class _Merge:
    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        settings: Settings,
        emit: Callable[[str, torch.Tensor], None],
        data_free: Callable[[str], torch.Tensor],
    ) -> None:
        self.settings, self.emit, self.data_free = settings, emit, data_free
        self.base, *experts = map(Skeleton, checkpoints)
        for expert in experts:
            if expert.stored.keys() != self.base.stored.keys():
                name = min(expert.stored.keys() ^ self.base.stored.keys())
                raise CheckpointError(
                    f"{expert.where}: of this model and {self.base.where} only one has {name}; rule sequence needs the "
                    "same architecture and tied weights; use rule: project"
                )
        # The base is an expert with a task vector of zero.
        self.models = [*experts, self.base] if settings.keep else experts
        # The text of one model runs in the result as well, so every model must have the positions.
        positions = (model.positions for model in (self.base, *experts))
        self.length = min([settings.probes.length, *(n for n in positions if n is not None)])
        self.weights = {stored: self._weights(stored, len(experts)) for stored in self.base.stored.values()}
        self.moved: dict[str, float] = {}

    def _weights(self, name: str, count: int) -> tuple[float, ...]:
        weights = tuple(self.settings.weight(name))
        if len(weights) != count or not all(0 <= w < float("inf") for w in weights):
            raise ConfigError(f"weight: {list(weights)} for {name}; rule sequence expects {count} of at least 0")
        return (*weights, self.settings.keep) if self.settings.keep else weights

    def run(self) -> Report:
        started = time.monotonic()
        texts = [self._write(model) for model in self.models]
        writing = time.monotonic() - started
        outside = {n: self._free(n) for n in self.base.outside}
        self.base.prepare(outside, self.base.layer(0), texts[0][0])
        self.streams = [self._enter(model, ids, outside) for model, ids in zip(self.models, texts)]
        for i in range(len(self.base.layers)):
            self._layer(i)
        if self.base.head:
            self._head(self.base.head, outside)
        for name in self.base.checkpoint.tensors:
            if name not in self.weights:
                self.emit(name, self.data_free(name))
        return Report(self.moved, sum(ids.numel() for ids in texts[0]), writing, time.monotonic() - started)

    def _write(self, model: Skeleton) -> list[torch.Tensor]:
        import torch

        p = self.settings.probes
        generator = torch.Generator().manual_seed(p.seed)
        return list(model.write(p.count * p.batch, self.length, p.temperature, generator).split(p.batch))

    def _enter(self, model: Skeleton, texts: list[torch.Tensor], outside: Mapping[str, torch.Tensor]) -> _Stream:
        own = model.weights(model.outside)
        if model is not self.base:
            model.prepare(own, model.layer(0), texts[0])
        merged = [self.base.enter(outside, ids) for ids in texts]
        return _Stream(model, texts, [model.enter(own, ids) for ids in texts], merged)

    def _free(self, name: str) -> torch.Tensor:
        """The data-free answer for a parameter, emitted as it is."""
        stored = self.base.stored[name]
        tensor = self.data_free(stored)
        self.emit(stored, tensor)
        return tensor

    def _layer(self, i: int) -> None:
        """Fit the maps of a layer, then let all streams pass it."""
        inside = f"{self.base.prefix}.{i}."
        maps = self.base.maps[i]
        solved = {f"{n}.weight" for n in maps}
        origin, owned = self.base.layer(i), [s.model.layer(i) for s in self.streams]
        merged = {
            n: self.data_free(self.base.stored[inside + n]) if n in solved else self._free(inside + n)
            for n in self.base.inside(i)
        }

        def matrix(weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
            weight = weights[f"{name}.weight"]
            return weight.T if is_transposed(maps[name]) else weight

        for group in self.base.groups(i, merged, self.streams[0].merged[0]):

            def pairs(m: int, group: Maps = group) -> Iterator[Pair]:
                return self._pairs(i, group, merged, owned[m], self.streams[m])

            for names in self._alike(group.names, inside):
                stored = [self.base.stored[f"{inside}{n}.weight"] for n in names]
                fitted = self._fit(
                    dict(zip(stored, (matrix(merged, n) for n in names))),
                    dict(zip(stored, (matrix(origin, n) for n in names))),
                    [dict(zip(stored, (matrix(w, n) for n in names))) for w in owned],
                    [
                        {s: w[f"{n}.bias"] - merged[f"{n}.bias"] for s, n in zip(stored, names) if f"{n}.bias" in w}
                        for w in owned
                    ],
                    pairs,
                )
                for n, s in zip(names, stored):
                    weight = fitted[s].T.contiguous() if is_transposed(maps[n]) else fitted[s]
                    merged[f"{n}.weight"] = weight
                    self.emit(s, weight)
        for stream, own in zip(self.streams, owned):
            stream.own = [stream.model.run(i, own, h) for h in stream.own]
            stream.merged = [self.base.run(i, merged, h) for h in stream.merged]

    def _alike(self, names: Iterable[str], inside: str) -> list[list[str]]:
        """Maps with the same weights of experts, which therefore have the same normal equations."""
        alike: dict[tuple[float, ...], list[str]] = {}
        for n in names:
            alike.setdefault(self.weights[self.base.stored[f"{inside}{n}.weight"]], []).append(n)
        return list(alike.values())

    def _pairs(
        self, i: int, maps: Maps, merged: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], stream: _Stream
    ) -> Iterator[Pair]:
        for h, h_merged in zip(stream.own, stream.merged):
            x, *residual = stream.model.inputs(i, own, h, maps)
            y, *residual_merged = self.base.inputs(i, merged, h_merged, maps)
            yield x, y, residual[0] - residual_merged[0] if residual else None

    def _head(self, head: str, outside: Mapping[str, torch.Tensor]) -> None:
        stored = self.base.stored[head]

        def pairs(m: int) -> Iterator[Pair]:
            stream = self.streams[m]
            own = stream.model.weights(stream.model.outside)
            for ids, h, h_merged in zip(stream.ids, stream.own, stream.merged):
                yield stream.model.leave(own, ids, h), self.base.leave(outside, ids, h_merged), None

        owned = [{stored: s.model.weights([head])[head]} for s in self.streams]
        free, origin = {stored: self.data_free(stored)}, {stored: self.base.weights([head])[head]}
        self.emit(stored, self._fit(free, origin, owned, [{} for _ in owned], pairs)[stored])

    def _fit(
        self,
        free: Mapping[str, torch.Tensor],
        origin: Mapping[str, torch.Tensor],
        owned: Sequence[Mapping[str, torch.Tensor]],
        biases: Sequence[Mapping[str, torch.Tensor]],
        pairs: Callable[[int], Iterator[Pair]],
    ) -> dict[str, torch.Tensor]:
        """The fitted weights [out, in] of maps with the same input, by name.

        Args:
            free: the data-free answers.
            origin: the base's weights.
            owned: by model, its weights.
            biases: by model, its biases less the result's.
            pairs: by number of the model, batches of inputs.
        """
        import torch

        first = next(iter(free))
        width, weights = free[first].shape[1], self.weights[first]
        scale = {n: self.settings.scale(n) for n in free}
        # The fit is made at lambda = 1.
        start = {n: origin[n] + (w - origin[n]) / scale[n] if scale[n] not in (0, 1) else w for n, w in free.items()}
        normal = torch.zeros(width, width, dtype=torch.float64)
        right = {n: torch.zeros_like(w) for n, w in free.items()}
        for m, weight in enumerate(weights):
            if not weight or not self.settings.trust:
                continue
            gram, cross, total = torch.zeros(width, width), torch.zeros(width, width), torch.zeros(width)
            lacking: torch.Tensor | None = None
            energy = 0.0
            for x, y, lack in pairs(m):
                gram += y.T @ y
                cross += x.T @ y
                total += y.sum(0)
                energy += float(x.double().square().sum())
                if lack is not None:
                    lacking = lack.T @ y + (0 if lacking is None else lacking)
            share = weight * width / energy if energy else 0.0
            normal += share * gram.double()
            for n, w in start.items():
                # Written as a difference from the data-free answer, so that nothing moves where that is right.
                found = owned[m][n] @ cross - w @ gram
                if n in biases[m]:
                    found += torch.outer(biases[m][n], total)
                if lacking is not None:
                    found += lacking
                right[n] += share * found
        return {n: self._solve(n, w, start[n], origin[n], owned, normal, right[n]) for n, w in free.items()}

    def _solve(
        self,
        name: str,
        free: torch.Tensor,
        start: torch.Tensor,
        origin: torch.Tensor,
        owned: Sequence[Mapping[str, torch.Tensor]],
        normal: torch.Tensor,
        right: torch.Tensor,
    ) -> torch.Tensor:
        import torch

        a, scale = self.settings.trust, self.settings.scale(name)
        mean = normal.diagonal().mean()
        if mean == 0 or scale == 0:
            self.moved[name] = 0.0
            return free
        metric = torch.zeros_like(normal)
        for weight, own in zip(self.weights[name], owned):
            task = own[name] - origin
            energy = float(task.double().square().sum())
            metric.diagonal().add_(weight * self.settings.rho)
            if energy:
                metric += (task.T @ task).double() * (weight * (1 - self.settings.rho) * len(normal) / energy)
        metric *= (1 - a) * mean / metric.diagonal().mean()
        factor, failed = torch.linalg.cholesky_ex(a * normal + metric)
        if failed or not bool(torch.isfinite(right).all()):
            raise CheckpointError(f"{self.base.where}: tensor {name}: activations of the probes are not finite; "
                                  "use rule: project")  # fmt: skip
        merged = free.clone(memory_format=torch.contiguous_format)
        moved = 0.0
        for rows in torch.arange(len(free)).split(ROWS):
            step = a * torch.cholesky_solve(right[rows].double().T, factor).T
            moved += float(step.square().sum())
            merged[rows] = (free[rows].double() + scale * step).float()
        drift = float((start - origin).double().norm())
        self.moved[name] = moved**0.5 / drift if drift else float(moved > 0) and float("inf")
        return merged
