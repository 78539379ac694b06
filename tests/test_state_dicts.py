"""seme.merge_state_dicts: the methods on models in memory give what the streamed merge gives."""

import numpy as np
import pytest
import torch

import seme
from seme.errors import ConfigError, SemeError
from seme.merging import merge

from .checkpoints import decoder, read, write

CASES = {
    "linear": (None, {"weight": [0.3, 0.5, 0.4]}, {}),
    "task_arithmetic": (0, {"weight": [0.3, 0.9]}, {"lambda": 0.8}),
    "ties": (0, {"weight": [0.3, 0.9], "density": [0.4, 0.7]}, {"rescale": True}),
    "slerp": (0, {}, {"t": 0.3}),
}


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("method", CASES)
def test_same_bytes_as_the_streamed_merge(method, backend, tmp_path):
    models = [decoder(seed, torch.bfloat16) for seed in range(2 if method == "slerp" else 3)]
    base, per_model, shared = CASES[method]
    found = seme.merge_state_dicts(models, method, base=base, parameters={**per_model, **shared}, backend=backend)
    for i, tensors in enumerate(models):
        write(tmp_path / str(i), tensors)
    experts = range(len(models)) if base is None else range(1, len(models))
    entries = [
        {"model": str(tmp_path / str(i)), "parameters": {k: v[j] for k, v in per_model.items()}}
        for j, i in enumerate(experts)
    ]
    config = {"merge_method": method, "models": entries, "parameters": shared}
    if base is not None:
        config["base_model"] = str(tmp_path / str(base))
    merge(config, tmp_path / "out")
    streamed = read(tmp_path / "out")
    assert list(found) == list(models[0])
    for name, tensor in found.items():
        assert torch.equal(tensor, streamed[name]), name


def test_nan_and_inf_go_through_the_formula():
    states = [{"w": torch.tensor([1.0, float("nan"), float("inf")])}, {"w": torch.ones(3)}]
    found = seme.merge_state_dicts(states, "linear", parameters={"weight": 1})["w"]
    assert found[0] == 1
    assert torch.isnan(found[1])
    assert torch.isinf(found[2])


def test_slerp_by_ids_and_modules():
    a, b = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    found = seme.merge_state_dicts({"x": a, "y": b}, "slerp", base="x", parameters={"t": 0})
    assert torch.equal(found["weight"], a.weight)
    ids = {"x": {"w": torch.ones(2)}, "y": {"w": torch.zeros(2)}}
    found = seme.merge_state_dicts(ids, "linear", parameters={"weight": {"x": 3, "y": 1}})
    assert found["w"].tolist() == [0.75, 0.75]


@pytest.mark.parametrize("weight", [2, "2e0", [2, 2], (2.0, "2"), {0: 2, 1: 2}, np.float64(2), np.array([2.0, 2.0])])
def test_ways_to_give_a_parameter(weight):
    states = [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]
    found = seme.merge_state_dicts(states, "linear", parameters={"weight": weight, "normalize": False})
    assert found["w"].tolist() == [2, 2]


def test_a_parameter_of_some_models_and_none_are_as_if_not_given():
    states = {name: {"w": torch.tensor([1.0, 2.0, 4.0]) * i} for i, name in enumerate("xyz")}
    one = {"weight": 1, "density": {"y": 0.4}, "lambda": None}
    found = seme.merge_state_dicts(states, "ties", base="x", parameters=one)
    every = {"weight": [1, 1], "density": [0.4, 1.0], "lambda": 1.0}
    assert torch.equal(found["w"], seme.merge_state_dicts(states, "ties", base="x", parameters=every)["w"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_copies_are_compared_by_their_bytes(dtype):
    x = torch.full((3,), float("nan")).to(dtype)
    found = seme.merge_state_dicts([{"x": x}, {"x": x.clone()}], "linear", parameters={"weight": 1})
    assert found["x"].dtype == dtype


def test_parameters_that_require_gradients_are_merged_without():
    module = torch.nn.Linear(3, 4)
    found = seme.merge_state_dicts([dict(module.named_parameters())] * 2, "linear", parameters={"weight": 1})
    assert not found["weight"].requires_grad
    assert torch.equal(found["weight"], module.weight)


def test_dtypes_and_buffers():
    a = {"w": torch.ones(3, dtype=torch.bfloat16), "ids": torch.arange(3), "none": torch.empty(0)}
    found = seme.merge_state_dicts([a, a], "linear", parameters={"weight": 0.5}, out_dtype=torch.float32)
    assert found["w"].dtype == torch.float32
    assert found["ids"].tolist() == [0, 1, 2]
    assert found["none"].shape == (0,)
    found["ids"][0] = 9
    assert a["ids"][0] == 0, "a copy, not the input"


@pytest.mark.parametrize(
    ("models", "method", "options", "message"),
    [
        ([{"w": torch.ones(2)}], "tie", {}, "unknown method 'tie'; did you mean 'ties'"),
        ([{"w": torch.ones(2)}] * 2, "ties", {"parameters": {"weight": 1}}, "base: missing"),
        ([{"w": torch.ones(2)}] * 2, "linear", {}, "parameters.weight: missing"),
        ([{"w": torch.ones(2)}] * 2, "linear", {"parameters": {"wieght": 1}}, "did you mean 'weight'"),
        ([{"w": torch.ones(2)}] * 2, "linear", {"parameters": {"weight": [1]}}, "1 values for 2 models"),
        ([{"w": torch.ones(2)}] * 2, "linear", {"parameters": {"weight": {0: 1}}}, "no value for model 1"),
        ([{"w": torch.ones(2)}] * 3, "slerp", {"base": 0, "parameters": {"t": 0.5}}, "found 3"),
        ([{"w": torch.ones(2)}, {"v": torch.ones(2)}], "linear", {"parameters": {"weight": 1}}, "not in all models"),
        ([{"w": torch.ones(2)}, {"w": torch.ones(3)}], "linear", {"parameters": {"weight": 1}}, r"\[3\].*\[2\]"),
        (
            [{"w": torch.arange(2)}, {"w": torch.ones(2).long()}],
            "linear",
            {"parameters": {"weight": 1}},
            "must be equal in all models",
        ),
        (
            [{"w": torch.ones(2)}, {"w": torch.ones(2).long()}],
            "linear",
            {"parameters": {"weight": 1}},
            "must be equal in all models",
        ),
        ([{"w": torch.ones(2)}] * 2, "linear", {"parameters": {"weight": {0: 1, 7: 1}}}, "7 is not one of the models"),
        ([{"w": torch.ones(2)}] * 2, "linear", {"parameters": {"weight": None}}, "parameters.weight: missing"),
        ([{"w": torch.ones(2)}] * 2, "linear", {"parameters": {"weight": "much"}}, "'much': expected a finite number"),
        ([{"w": torch.ones(2)}] * 2, "linear", {"parameters": {"weight": [1, [1]]}}, "expected a finite number"),
        ({"w": torch.ones(2), "v": torch.ones(2)}, "linear", {}, "models\\['w'\\]: expected a state dict or a module"),
        ([{"w": 3}] * 2, "linear", {"parameters": {"weight": 1}}, "entry 'w' is not a dense tensor"),
        ([{"w": torch.eye(2).to_sparse()}] * 2, "linear", {"parameters": {"weight": 1}}, "is not a dense tensor"),
        ([], "linear", {"parameters": {"weight": 1}}, "linear takes 1 or more models, base included; found 0"),
        ([{"w": torch.ones(2)}] * 2, "linear", {"parameters": {"weight": [1, -1]}}, "add up to 0 for tensor w"),
        ([{"w": torch.ones(2)}] * 2, "linear", {"parameters": {"weight": 1e300}}, "1e.300 is infinite in float32"),
        (
            [{"w": torch.ones(2)}] * 2,
            "ties",
            {"base": 0, "parameters": {"weight": 1, "density": 50}},
            "parameters.density: 50.0; expected a number from 0 to 1",
        ),
        (
            [{"w": x.to(torch.float8_e4m3fn)} for x in torch.eye(2)],
            "linear",
            {"parameters": {"weight": 1}},
            r"^tensor w \(float8_e4m3fn\) differs: float8_e4m3fn is copied, not merged; convert the models to bfloat16",
        ),
        ([{"w": torch.ones(2)}] * 2, "linear", {"threads": -1}, "^threads: -1; expected a whole number, at least 0$"),
        ([{"w": torch.ones(2)}] * 2, "linear", {"threads": "2"}, "^threads: '2'; expected a whole number"),
        ([{"w": torch.ones(2)}] * 2, "linear", {"dtype": torch.int32}, r"^dtype: torch.int32; expected one of torch\."),
        ([{"w": torch.ones(2)}] * 2, "linear", {"dtype": "float32"}, r"^dtype: 'float32'; expected one of torch\."),
        (
            [{"w": torch.ones(2)}] * 2,
            "linear",
            {"out_dtype": torch.float8_e4m3fn},
            r"^out_dtype: torch.float8_e4m3fn; expected one of torch.float32, torch.float16, ",
        ),
        (
            [{"w": torch.ones(2, device="meta")}] * 2,
            "linear",
            {},
            "tensor 'w' is on device meta, without data; load it",
        ),
        ([{"w": torch.ones(2)}] * 2, "linear", {"base": 5, "parameters": {"weight": 1}}, "5 is not one of the models"),
    ],
)
def test_mistakes(models, method, options, message):
    with pytest.raises((ConfigError, SemeError), match=message):
        seme.merge_state_dicts(models, method, **options)
