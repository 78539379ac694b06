"""What mergekit's own tests promise of it, asked of seme; where it takes a merge to see it, of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import seme
from seme.errors import ConfigError

from ..checkpoints import read, write
from .families import FAMILIES
from .oracle import Oracle
from .test_mergekit import run_both


def by_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Mixtral checkpoint as it was stored before transformers 5: three matrices of each expert."""
    found = {}
    for name, x in tensors.items():
        layer, _, part = name.partition("mlp.")
        moe = f"{layer}block_sparse_moe."
        if part == "experts.gate_up_proj":
            for i, expert in enumerate(x):
                found[f"{moe}experts.{i}.w1.weight"], found[f"{moe}experts.{i}.w3.weight"] = expert.chunk(2)
        elif part == "experts.down_proj":
            found.update({f"{moe}experts.{i}.w2.weight": expert for i, expert in enumerate(x)})
        else:
            found[f"{moe}{part}" if part else name] = x
    return found


def test_experts_of_their_own_are_merged_as_mergekit_merges_them_together(
    model: Callable[[str, str, str], Path], oracle: Oracle, tmp_path: Path
) -> None:
    """mergekit writes transformers 5's layout, seme that of the checkpoints; the values are the same."""
    config = {**FAMILIES["mixtral"].config, "dtype": "float32"}
    a, b = (write(tmp_path / m, by_expert(read(model("mixtral", m, "float32"))), config, layout="shards") for m in "ab")
    text = (
        f"merge_method: linear\nmodels: [{{model: {a}, parameters: {{weight: [0.1, 0.7]}}}}, {{model: {b}}}]\n"
        "parameters: {weight: 0.3}\ndtype: float32\n"
    )
    ours, theirs = run_both(text, oracle, tmp_path)
    mine, other = read(ours), by_expert(read(theirs))
    assert set(mine) == set(other) == set(read(a))
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("density", [1e-6, 0.3, 1])
def test_ties_keeps_the_only_element_of_a_tensor(density: float) -> None:
    states = [{"w": torch.tensor([x])} for x in (1.0, 3.0)]
    found = seme.merge_state_dicts(states, "ties", base=0, parameters={"weight": 0.5, "density": density})
    assert found["w"].tolist() == [3]  # the weights that agree add up to 0.5, by which is divided


@pytest.mark.parametrize("method", ["task_arithmetic", "breadcrumbs"])
def test_weights_that_add_up_to_0_are_not_divided_by(
    method: str, model: Callable[[str, str, str], Path], oracle: Oracle, tmp_path: Path
) -> None:
    """By default that is an error of the recipe."""
    base, a, c = (model("llama", m, "float32") for m in ("base", "a", "c"))
    text = (
        f"merge_method: {method}\nbase_model: {base}\nmodels: [{{model: {a}, parameters: {{weight: 0.5}}}}, "
        f"{{model: {c}, parameters: {{weight: -0.5}}}}]\nparameters: {{normalize: true}}\ncompat: mergekit\n"
    )
    ours, theirs = (read(folder) for folder in run_both(text, oracle, tmp_path))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ConfigError, match=r"add up to 0 for tensor .* set normalize: false"):
        seme.merge(text.replace("compat: mergekit", ""), tmp_path / "out")


@pytest.mark.parametrize("filter_wise", [False, True])
def test_light_fine_tunes_in_model_stock(
    filter_wise: bool, model: Callable[[str, str, str], Path], oracle: Oracle, tmp_path: Path
) -> None:
    """Task vectors so short that mergekit does not divide by their norms: it keeps the base almost alone. ``compat:
    mergekit`` does so too; seme's own cosine does not depend on lengths."""
    base = model("llama", "base", "float32")
    origin = read(base)
    config = json.loads((base / "config.json").read_text())
    generator = torch.Generator().manual_seed(3)
    common = {name: torch.randn(t.shape, generator=generator) for name, t in origin.items()}
    size = 1e-4 if filter_wise else 1e-6
    tuned = []
    for i in range(2):
        state = {
            name: (t.double() + size * (common[name] + 0.3 * torch.randn(t.shape, generator=generator))).float()
            for name, t in origin.items()
        }
        tuned.append(write(tmp_path / f"tuned{i}", state, config))
    text = (
        f"merge_method: model_stock\nbase_model: {base}\nmodels: [{{model: {tuned[0]}}}, {{model: {tuned[1]}}}]\n"
        f"parameters: {{filter_wise: {filter_wise}}}\ndtype: float64\n"
    )
    ours, theirs = (read(f) for f in run_both(text + "compat: mergekit\n", oracle, tmp_path))
    own = read(seme.merge(text, tmp_path / "own").path)
    name = "model.layers.1.mlp.up_proj.weight"
    for key, tensor in theirs.items():
        # Errors of float64 in sums of a few thousand products, relative to weights below 2.
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-14)
    moved = [float((found[name] - origin[name].double()).norm()) for found in (theirs, own)]
    # Of norms of 5e-4 (rows) and 3e-5 (tensors) the product is a quarter, a thousandth, of 1e-6; cosines are 0.9.
    assert moved[0] < 0.6 * moved[1]


@pytest.mark.parametrize(("t", "end"), [(0, 0), (1, 1)])
@pytest.mark.parametrize("angle", [0.0, 1e-3, 1.0])
def test_slerp_ends_at_its_models(t: int, end: int, angle: float) -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, 7, 9, generator=generator)
    states = [{"w": x}, {"w": x + angle * y}]
    found = seme.merge_state_dicts(states, "slerp", base=0, parameters={"t": t})["w"]
    # sin(angle) / sin(angle) is 1 and sin(0) is 0, exactly.
    assert torch.equal(found, states[end]["w"])


@pytest.mark.parametrize("method", ["karcher", "multislerp"])
def test_models_of_one_direction_are_merged_at_their_mean_length(method: str) -> None:
    x = torch.randn(5, 11, generator=torch.Generator().manual_seed(6))
    states = [{"w": x}, {"w": 3 * x}, {"w": 5 * x}]
    parameters = {"weight": 1} if method == "multislerp" else {}
    found = seme.merge_state_dicts(states, method, parameters=parameters)["w"]
    # A unit vector, its length and their product are each rounded to float32.
    torch.testing.assert_close(found, 3 * x, rtol=1e-6, atol=0)
