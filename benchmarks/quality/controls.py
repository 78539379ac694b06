"""Controls: the rules of the method ``seme`` with something else in the place of the semantic bases.

If random vectors in the place of the bases did as well, the bases would explain nothing. Plain float64 torch on small
models: the frames are [v, d] and are used as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.quality.models import State

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
WRITES = ("o_proj.weight", "down_proj.weight")


def frame(base: State, kind: str) -> torch.Tensor:
    """Unit vectors of the latent space [v, d]: ``bases`` (the pseudoinverse of the head with the final norm's gain
    folded in), ``head`` (its rows), ``embeddings`` (the input's rows), ``random`` (as many, isotropic), or ``raw``
    (the coordinate axes, [d, d]).
    """
    head = base[HEAD].double() * base["model.norm.weight"].double()
    if kind == "bases":
        vectors = torch.linalg.solve(head.T @ head, head.T).T
    elif kind == "head":
        vectors = head
    elif kind == "embeddings":
        vectors = base[EMBEDDING].double()
    elif kind == "random":
        vectors = torch.randn(head.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    else:
        vectors = torch.eye(head.shape[1], dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=1)


def _unit(moment: torch.Tensor) -> torch.Tensor:
    """Scaled to trace 1; zero stays zero."""
    trace = moment.trace()
    return moment / trace if trace > 0 else moment


def embedding(base: State, experts: Sequence[State]) -> torch.Tensor:
    """The experts' task vectors of the embedding [experts, v, d]."""
    return torch.stack([e[EMBEDDING].double() - base[EMBEDDING].double() for e in experts])


def drift(task: torch.Tensor) -> torch.Tensor:
    """The rule of ``seme`` for embeddings: each row is the mean over the experts, weighted by how far each moved it."""
    energy = task.square().sum(2, keepdim=True)
    return (energy * task).sum(0) / energy.sum(0).clamp(min=1e-300)


def project(
    base: State, experts: Sequence[State], vectors: torch.Tensor, sigma: float, select: float = 0.1, rho: float = 0.2
) -> State:
    """Rule ``project``, where the selection on labels (share ``sigma``) is made on ``vectors``."""
    merged = {}
    for name, start in base.items():
        task = [e[name].double() - start.double() for e in experts]
        if name == EMBEDDING:
            merged[name] = drift(torch.stack(task))
        elif start.ndim != 2:
            merged[name] = sum(task) / len(task)
        else:
            size = start.shape[1]
            shares = []
            for t in task:
                moment = _unit(t.T @ t)
                if not name.endswith(WRITES) and sigma:
                    energy = ((vectors @ moment) * vectors).sum(1)
                    kept = energy.topk(max(1, int(select * len(energy)))).indices
                    label = _unit(vectors[kept].T @ (energy[kept, None] * vectors[kept]))
                    moment = (1 - sigma) * moment + sigma * label
                shares.append((1 - rho) * size * moment + rho * torch.eye(size, dtype=torch.float64))
            merged[name] = torch.linalg.solve(sum(shares), sum(t @ c for t, c in zip(task, shares)).T).T
    return merged


def elect(base: State, experts: Sequence[State], vectors: torch.Tensor, select: float = 0.1) -> State:
    """Rule ``elect`` with ``vectors`` in the place of the bases; matrices along their latent axis."""
    dual = torch.linalg.solve(vectors.T @ vectors, vectors.T).T
    merged = {}
    for name, start in base.items():
        task = torch.stack([e[name].double() - start.double() for e in experts])
        if name == EMBEDDING:
            merged[name] = drift(task)
            continue
        if start.ndim != 2:
            merged[name] = task.mean(0)
            continue
        writes = name.endswith(WRITES)
        if writes:
            task = task.transpose(1, 2)
        z = task @ vectors.T
        variance = z.var(0, unbiased=False)
        selected = torch.zeros_like(variance).flatten()
        selected[variance.flatten().topk(max(1, int(select * variance.numel()))).indices] = 1
        energy = (z.square() * selected.view_as(variance)).sum((1, 2))
        total = energy.sum()
        eta = energy / total if total > 0 else torch.full_like(energy, 1 / len(energy))
        weight = eta[:, None, None] * ((z.sign() == z.sum(0).sign()) & (z != 0))
        out = ((weight * z).sum(0) / weight.sum(0).clamp(min=1e-12)) @ dual
        merged[name] = out.T if writes else out
    return merged
