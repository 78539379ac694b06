"""seme/sections.py: modules and layers, found from the names of tensors, and what config.json says of them."""

from __future__ import annotations

from typing import Any

import pytest

from seme.errors import CheckpointError, ConfigError
from seme.sections import LayerIndex, before, choose, is_all, modules, with_layers


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"], ["default", "default"]),
        # An encoder alone, with a decoder that is a head.
        (["bert.encoder.layer.0.output.dense.weight", "cls.predictions.decoder.weight"], ["default", "default"]),
        (["model.decoder.layers.0.fc1.weight", "lm_head.weight"], ["default", "default"]),
        (
            ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.x", "lm_head.weight"],
            ["shared", "encoder", "decoder", "shared"],
        ),
        (
            ["model.encoder.conv1.weight", "model.encoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight"],
            ["encoder", "encoder", "decoder"],
        ),
        (
            ["language_model.model.layers.0.x", "vision_tower.blocks.0.x", "multi_modal_projector.linear_1.weight"],
            ["text_decoder", "vision_tower", "multi_modal_projector"],
        ),
        (
            ["model.layers.0.x", "visual.blocks.0.x", "visual.merger.mlp.0.weight", "lm_head.weight"],
            ["text_decoder", "vision_tower", "multi_modal_projector", "text_decoder"],
        ),
        (
            ["thinker.model.layers.0.x", "thinker.audio_tower.layers.0.x", "thinker.visual.blocks.0.x"],
            ["text_decoder", "audio_tower", "vision_tower"],
        ),
    ],
)
def test_modules(names: list[str], expected: list[str]) -> None:
    assert list(modules(names).values()) == expected


FOUND = {"vision_model.a": "vision_tower", "b": "text_decoder"}


class TestChoose:
    def test_by_name_and_by_what_the_tensors_are_called(self) -> None:
        assert choose([("text_decoder", "m"), ("vision_tower", "n")], FOUND) == ["text_decoder", "vision_tower"]
        assert choose([("vision_model", "m"), ("text_decoder", "n")], FOUND) == ["vision_tower", "text_decoder"]

    def test_one_that_is_everything(self) -> None:
        assert is_all([None])
        assert is_all(["default"])  # of whatever modules there are
        assert not is_all(["default", "vision_tower"])
        assert not is_all(["text_decoder"])

    @pytest.mark.parametrize(
        ("wanted", "message"),
        [
            (["text_decodr"], "modules.0: the model has no such module; did you mean 'text_decoder'?"),
            (["vision_model", "vision_tower"], "modules.1: the module vision_tower is given twice; remove one"),
            (["vision_tower"], "modules.text_decoder: missing, and nothing is left out; add it with models or slices"),
        ],
    )
    def test_mistakes(self, wanted: list[str], message: str) -> None:
        with pytest.raises(ConfigError) as e:
            choose([(w, f"modules.{i}") for i, w in enumerate(wanted)], FOUND)
        assert str(e.value) == message


def test_layers_move_and_the_ends_go_with_the_first_and_the_last_slice() -> None:
    names = [
        "wte.weight",
        *(f"h.{i}.experts.{j}.w" for i in range(3) for j in range(2)),
        "ln_f.weight",
        "lm_head.weight",
    ]
    index = LayerIndex(names)
    assert index.count("slices") == 3
    assert index.moved(range(1, 3), 5, first=False, last=False) == {
        f"h.{i + 4}.experts.{j}.w": f"h.{i}.experts.{j}.w" for i in (1, 2) for j in range(2)
    }
    assert list(index.moved(range(0), 0, first=True, last=False)) == ["wte.weight"]
    assert list(index.moved(range(0), 0, first=False, last=True)) == ["ln_f.weight", "lm_head.weight"]
    assert LayerIndex(["0.w", "1.w", "out.w"]).moved(range(1, 2), 3, first=False, last=False) == {"3.w": "1.w"}
    assert LayerIndex(["a.weight"]).count("slices") == 0
    with pytest.raises(ConfigError, match=r"^slices: the model has several stacks of layers: a \(1\), b \(2\); write"):
        LayerIndex(["a.0.w", "b.1.w"]).count("slices")


def test_a_slice_has_the_order_of_the_files() -> None:
    names = ["lm_head.weight", "h.10.w", "h.2.w", "h.2.b", "wte.weight", "h.0.w", "ln_f.weight"]
    found = LayerIndex(names).moved(range(0, 11), 0, first=True, last=True)
    assert list(found.items()) == [(name, name) for name in names]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "transformer.wpe.weight", "vision.class_embedding"])
def test_before(name: str) -> None:
    assert before(name)


@pytest.mark.parametrize("name", ["model.norm.weight", "embed_out.weight", "lm_head.bias", "pre_classifier.weight"])
def test_after(name: str) -> None:
    assert not before(name)


class TestConfig:
    def test_count_and_lists_follow_the_layers(self) -> None:
        a: dict[str, Any] = {
            "num_hidden_layers": 2,
            "layer_types": ["x", "y"],
            "eos_token_id": [1, 2],
            "model_type": "m",
        }
        b: dict[str, Any] = {"num_hidden_layers": 3, "layer_types": ["p", "q", "r"], "mlp_only_layers": [1]}
        found = with_layers({**a, "mlp_only_layers": [0]}, "default", [(a, 1), (b, 2), (b, 1), ({}, 0)])
        assert found == {
            "num_hidden_layers": 4,
            "layer_types": ["y", "r", "q", "x"],  # the donor's where the model says nothing
            "mlp_only_layers": [2],
            "eos_token_id": [1, 2],
            "model_type": "m",
        }

    @pytest.mark.parametrize(
        ("config", "module", "expected"),
        [
            ({"n_layer": 2}, "default", {"n_layer": 1}),
            ({"text_config": {"num_hidden_layers": 2}}, "text_decoder", {"text_config": {"num_hidden_layers": 1}}),
            ({"num_hidden_layers": 2, "vision_config": {"depth": 3}}, "text_decoder", {"num_hidden_layers": 1}),
            ({"num_hidden_layers": 2, "vision_config": {"depth": 3}}, "vision_tower", {"vision_config": {"depth": 1}}),
            ({"encoder_layers": 2, "num_hidden_layers": 2}, "encoder", {"encoder_layers": 1, "num_hidden_layers": 1}),
            ({"decoder_layers": 2, "num_hidden_layers": 2}, "decoder", {"decoder_layers": 1}),
            ({"num_layers": 2}, "decoder", {"num_decoder_layers": 1}),
        ],
    )
    def test_the_entry_depends_on_the_module(
        self, config: dict[str, Any], module: str, expected: dict[str, Any]
    ) -> None:
        assert with_layers(config, module, [(config, 0)]) == {**config, **expected}

    def test_without_an_entry_it_is_an_error(self) -> None:
        with pytest.raises(
            CheckpointError, match=r"^config.json: none of num_hidden_layers, n_layer, .* says how many"
        ):
            with_layers({"depths": 3}, "default", [({}, 0)])
