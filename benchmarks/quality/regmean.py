"""RegMean with the experts' real inputs: the ceiling, since it has the data that the other methods do without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.quality.models import State


def moments(model: Any, state: State, draw: Callable[[], torch.Tensor], batches: int = 24) -> State:
    """Second moments of the inputs of every linear map, ``X^T X / tokens`` [in, in] in float64, by weight name, and
    for the embedding the share of each token [v], on training batches of the expert.
    """
    model.load_state_dict(state)
    model.eval()
    found: State = {}
    tokens = 0

    def watch(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).double() if inputs[0].is_floating_point() else inputs[0].flatten()
            if x.is_floating_point():
                found[name] = found.get(name, 0) + x.T @ x
            else:
                found[name] = found.get(name, 0) + torch.bincount(x, minlength=len(state[name])).double()

        return hook

    layers = (torch.nn.Linear, torch.nn.Embedding)
    hooks = [
        m.register_forward_pre_hook(watch(f"{n}.weight")) for n, m in model.named_modules() if isinstance(m, layers)
    ]
    try:
        with torch.inference_mode():
            for _ in range(batches):
                batch = draw()
                tokens += batch.numel()
                model(input_ids=batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {k: v / tokens for k, v in found.items()}


def regmean(base: State, experts: Sequence[State], inputs: Sequence[State], shrink: float = 0.9) -> State:
    """RegMean (arXiv 2212.09849): ``W = (sum_m W_m G_m) (sum_m G_m)^-1``, G_m the second moment of expert m's inputs
    with its off-diagonal entries times ``shrink``. The embedding's inputs are one-hot, so its G is diagonal; the other
    tensors are averaged. Returns the difference from the base.
    """
    merged = {}
    for name, start in base.items():
        task = [e[name].double() - start.double() for e in experts]
        gram = [g.get(name) for g in inputs]
        if any(g is None for g in gram):
            merged[name] = sum(task) / len(task)
        elif gram[0].ndim == 1:
            share = torch.stack(gram)[:, :, None] + 1e-7
            merged[name] = (share * torch.stack(task)).sum(0) / share.sum(0)
        else:
            gram = [shrink * g + (1 - shrink) * torch.diag(g.diagonal()) for g in gram]
            answers = sum(t @ g for t, g in zip(task, gram))
            merged[name] = torch.linalg.solve(sum(gram), answers.T).T
    return merged
