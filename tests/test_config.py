"""seme/config.py: the value grammar, and every mistake named by its path in the file."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seme import dtypes
from seme.checkpoint.hub import ModelRef
from seme.config import KEYS, Condition, Parameter, TokenizerConfig, convert, interpolate, load, override, suggest
from seme.errors import ConfigError, brief
from seme.methods import methods

MODELS = [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b"}]
RECIPE: dict[str, Any] = {"merge_method": "linear", "models": MODELS}

TEXT = """\
merge_method: ties   # a comment
base_model: base
models:
  - model: org/a@main
    parameters: {weight: 1, density: [0.1, 0.9]}
  - model: {model: {path: org/b, revision: v2}}
    parameters:
      weight:
        - filter: mlp
          value: 5e-1
        - value: [0, 1]
parameters: {normalize: true, lambda: "1e-5"}
dtype: float32
out_dtype: torch.bfloat16
tokenizer_source: base
"""


def parameter(value: Any, scope: str = "weight") -> Parameter:
    return load({**RECIPE, "parameters": {scope: value}}).parameters[scope]


class TestLoading:
    def test_text_file_path_and_mapping_say_the_same(self, tmp_path: Path) -> None:
        import yaml

        file = tmp_path / "recipe.yml"
        file.write_text(TEXT)
        text = load(TEXT)
        assert text == load(file) == load(str(file))
        mapping = load(yaml.safe_load(TEXT))
        assert mapping.models == text.models
        assert mapping.parameters == text.parameters

    def test_the_parts_of_a_recipe(self) -> None:
        config = load(TEXT)
        assert config.merge_method == "ties"
        assert [m.ref for m in config.models] == [ModelRef("org/a", "main"), ModelRef("org/b", "v2")]
        assert config.base_model == ModelRef("base")
        assert config.tokenizer == TokenizerConfig(ModelRef("base"), {}, 1, "tokenizer_source")
        assert (config.dtype, config.out_dtype) == (dtypes.float32, dtypes.bfloat16)
        assert config.compat is None
        assert config.models[0].parameters["density"] == Parameter((0.1, 0.9), "models[0].parameters.density")
        assert config.models[1].parameters["weight"].value == (Condition("mlp", "5e-1"), Condition(None, (0, 1)))

    def test_the_source_is_kept_as_written(self) -> None:
        assert load(TEXT).source == TEXT

    def test_a_mapping_is_written_as_yaml_that_reads_back(self) -> None:
        config = load({**RECIPE, "parameters": {"weight": (0.25, 0.75)}})
        assert load(config.source).parameters == config.parameters

    def test_one_line_of_text_is_text(self) -> None:
        assert load("{merge_method: linear, models: [{model: a}]}").merge_method == "linear"

    def test_a_mapping_may_hold_paths_tuples_and_numpy_numbers(self, tmp_path: Path) -> None:
        models = ({"model": tmp_path, "parameters": {"weight": np.float64(0.5)}},)
        config = load({"merge_method": "linear", "models": models})
        assert config.models[0].ref == ModelRef(str(tmp_path))
        assert config.models[0].parameters["weight"].at("x", 0, float) == 0.5

    @pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, np.zeros(2), 1j])
    def test_a_mapping_holds_nothing_that_yaml_could_not(self, value: Any) -> None:
        with pytest.raises(ConfigError, match=r"^recipe: .*: a recipe holds mappings, lists, numbers"):
            load({**RECIPE, "dtype": value})

    def test_a_mapping_that_holds_itself(self) -> None:
        recipe: dict[str, Any] = {**RECIPE}
        recipe["models"] = [recipe]
        with pytest.raises(ConfigError, match=r"^recipe: nested too deep, perhaps in itself$"):
            load(recipe)

    @pytest.mark.parametrize("config", [None, 5, [RECIPE], b"merge_method: linear"])
    def test_of_what_is_no_recipe(self, config: Any) -> None:
        with pytest.raises(
            ConfigError, match=r"^recipe: .*; expected a mapping, the path of a YAML file, or YAML text$"
        ):
            load(config)

    def test_a_local_path_is_taken_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("a+b", "a@b", "a@b@c"):
            Path(name).mkdir()
            assert load({**RECIPE, "models": [{"model": name}]}).models[0].ref == ModelRef(name)

    @pytest.mark.parametrize(
        "value",
        [
            "org/a@v2",
            {"path": "org/a", "revision": "v2"},
            {"model": "org/a@v2", "lora": None, "override_architecture": None},
            {"model": "org/a", "revision": "v2"},
            {"model": {"path": "org/a", "revision": "v2"}},
        ],
    )
    def test_every_form_of_a_reference_keeps_its_revision(self, value: Any) -> None:
        config = load({**RECIPE, "models": [{"model": value}], "base_model": value})
        assert config.base_model == config.models[0].ref == ModelRef("org/a", "v2")

    def test_one_folder_in_two_spellings_is_one_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("a").mkdir()
        Path("link").symlink_to("a")
        for spelling in ("./a", "a/", str(tmp_path / "a"), "link"):
            with pytest.raises(ConfigError, match=r"^models\[1\]: .* is listed twice, models\[0\] is the same"):
                load({**RECIPE, "models": [{"model": "a"}, {"model": spelling}]})

    def test_null_is_as_if_not_written(self) -> None:
        config = load({**RECIPE, "base_model": None, "parameters": None, "dtype": None, "tokenizer_source": None})
        assert (config.base_model, config.parameters, config.dtype, config.tokenizer) == (None, {}, None, None)
        assert load({**RECIPE, "parameters": {"weight": None}}).parameters == {}

    def test_base_tokenizer_without_a_base_is_the_first_models(self) -> None:
        for value, expected in (("base", ModelRef("a")), ("b@r", ModelRef("b", "r")), ("union", None)):
            found = load({**RECIPE, "tokenizer_source": value}).tokenizer
            assert found is not None
            assert found.source == expected
            assert load({**RECIPE, "tokenizer": {"source": value}}).tokenizer == replace(
                found, where="tokenizer.source"
            )

    def test_merge_keys_and_aliases_of_yaml(self) -> None:
        text = """
        merge_method: linear
        models:
          - model: a
            parameters: &p {weight: 1, normalize: true}
          - model: b
            parameters: {<<: *p, weight: 2}
        """
        second = load(text).models[1].parameters
        assert {k: p.value for k, p in second.items()} == {"weight": 2, "normalize": True}

    def test_a_mapping_that_others_merge_is_not_taken_for_one_with_a_key_twice(self) -> None:
        # The alias is flattened at depth 1 before the mapping it names is built at depth 3.
        text = """
        base_model: {path: base}
        models:
          - model: a
            parameters: {weight: &c {<<: &b {filter: x, value: 1}, value: 2}}
        merge_method: linear
        parameters: {weight: {<<: *c, value: 3}}
        """
        config = load(text)
        assert config.parameters["weight"].at("x", 0, float) == 3
        assert config.models[0].parameters["weight"].at("x", 0, float) == 2


class TestValues:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (1, 1.0),
            (0.25, 0.25),
            ("1e-5", 1e-5),
            ("0.5", 0.5),
            (" -.5E+2 ", -50.0),
            ("3.", 3.0),
            ("+7", 7.0),
        ],
    )
    def test_numbers(self, value: Any, expected: float) -> None:
        found = convert(value, float, "here")
        assert found == expected
        assert type(found) is float

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "one",
            "1e",
            ".",
            "1_000",
            "0x10",
            "nan",
            "inf",
            "1e999",
            True,
            float("nan"),
            float("inf"),
            10**4000,
            "1 2",
        ],
    )
    def test_what_is_no_finite_number(self, value: Any) -> None:
        with pytest.raises(ConfigError, match=r"^here: .*: expected a finite number$"):
            convert(value, float, "here")

    def test_whole_numbers(self) -> None:
        assert convert("3", int, "here") == 3
        assert convert(2.0, int, "here") == 2
        assert convert(2**60 + 1, int, "here") == 2**60 + 1
        with pytest.raises(ConfigError, match=r"^here: 2.5: expected a whole number$"):
            convert(2.5, int, "here")

    @pytest.mark.parametrize(
        ("value", "expected"),
        [(True, True), (0, False), (1, True), ("yes", True), ("OFF", False), ("Y", True), ("0", False)],
    )
    def test_booleans(self, value: Any, expected: bool) -> None:
        assert convert(value, bool, "here") is expected

    @pytest.mark.parametrize("value", [2, -1, 0.5, "perhaps", ""])
    def test_what_is_no_boolean(self, value: Any) -> None:
        with pytest.raises(ConfigError, match=r"^here: .*: expected true or false$"):
            convert(value, bool, "here")

    def test_text(self) -> None:
        assert convert("x", str, "here") == "x"
        with pytest.raises(ConfigError, match=r"^here: 1: expected text$"):
            convert(1, str, "here")


class TestGradients:
    @pytest.mark.parametrize(
        ("values", "t", "expected"),
        [
            ((0.0, 1.0), 0.0, 0.0),
            ((0.0, 1.0), 0.25, 0.25),
            ((0.0, 1.0), 1.0, 1.0),
            ((0.0, 10.0, 0.0), 0.5, 10.0),
            ((0.0, 10.0, 0.0), 0.75, 5.0),
            ((7.0,), 0.6, 7.0),
        ],
    )
    def test_are_linear_between_anchors(self, values: tuple[float, ...], t: float, expected: float) -> None:
        assert interpolate(values, t) == expected

    def test_of_text_and_booleans_are_steps(self) -> None:
        assert [interpolate(("x", "y", "z"), t) for t in (0.0, 0.49, 0.5, 0.99, 1.0)] == ["x", "x", "y", "y", "z"]
        assert [parameter([True, False], "normalize").at("x", t, bool) for t in (0.0, 0.9, 1.0)] == [True, True, False]

    def test_of_written_numbers_are_numbers(self) -> None:
        assert parameter(["0", "1e-1"]).at("x", 0.5, float) == pytest.approx(0.05, abs=1e-18)

    def test_an_empty_one_counts_as_not_set(self) -> None:
        assert parameter([]).at("x", 0.5, float) is None
        assert parameter({"value": []}).at("x", 0.5, float) is None


class TestConditions:
    def test_the_first_that_matches_holds(self) -> None:
        p = parameter([{"filter": "mlp", "value": 1}, {"filter": "*", "value": 2}, {"value": 3}])
        assert [p.at(name, 0, float) for name in ("layers.0.mlp.up", "norm")] == [1, 2]

    def test_a_filter_is_a_substring_not_a_pattern(self) -> None:
        p = parameter({"filter": "layers.1", "value": 1})
        assert [p.at(n, 0, float) for n in ("layers.1.x", "layers.11.x", "layersx1", "layers.2")] == [1, 1, None, None]

    def test_their_values_may_be_gradients(self) -> None:
        p = parameter([{"filter": "mlp", "value": [0, 1]}, {"value": "2"}])
        assert (p.at("mlp", 0.5, float), p.at("norm", 0.5, float)) == (0.5, 2.0)

    def test_an_empty_filter_is_in_every_name(self) -> None:
        assert parameter({"filter": "", "value": 1}).at("x", 0, float) == 1

    def test_a_wrong_value_is_named_where_it_is_used(self) -> None:
        p = parameter([{"filter": "mlp", "value": "much"}, {"value": 1}])
        assert p.at("norm", 0, float) == 1
        with pytest.raises(ConfigError, match=r"^parameters.weight: 'much': expected a finite number$"):
            p.at("mlp", 0, float)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"merge_method": None}, "merge_method: missing; name a method, e.g. task_arithmetic"),
    ({"merge_method": 3}, "merge_method: missing;"),
    ({"models": None}, "models: missing; expected a list of {model: PATH, parameters: {...}}"),
    ({"models": []}, "models: missing; expected a list"),
    ({"models": {"model": "a"}}, "models: {'model': 'a'}; expected a list"),
    ({"models": "a"}, "models: 'a'; expected a list"),
    ({"models": ["a"]}, "models[0]: expected {model: PATH, parameters: {...}}, found 'a'"),
    ({"models": [{"modle": "a"}]}, "models[0]: expected {model: PATH"),
    (
        {"models": [{"model": "a"}, {"model": "b", "parametres": {}}]},
        "models[1].parametres: unknown key; did you mean 'parameters'?",
    ),
    ({"models": [{"model": 7}]}, "models[0].model: expected a path or a hub id, found 7"),
    ({"models": [{"model": ""}]}, "models[0].model: expected a path or a hub id, found ''"),
    ({"models": [{"model": "a+b+c"}]}, "models[0].model: a+b+c: expected MODEL or MODEL+ADAPTER; a model takes one"),
    ({"models": [{"model": "a+"}]}, "models[0].model: a+: expected PATH or PATH@REVISION, maybe with +ADAPTER"),
    ({"models": [{"model": "a@b@c"}]}, "models[0].model: a@b@c: expected PATH or PATH@REVISION"),
    ({"models": [{"model": "a@"}]}, "models[0].model: a@: expected PATH or PATH@REVISION"),
    ({"models": [{"model": "@r"}]}, "models[0].model: @r: expected PATH or PATH@REVISION"),
    ({"models": [{"model": {"model": "a+c", "lora": "b"}}]}, "models[0].model.lora: a second adapter; a model takes"),
    ({"models": [{"model": {"model": "a", "lora": "b+c"}}]}, "models[0].model.lora: a second adapter; a model takes"),
    (
        {"models": [{"model": {"path": "a", "revison": "b"}}]},
        "models[0].model.revison: unknown key; did you mean 'revision'?",
    ),
    ({"base_model": {"model": "a", "revison": "b"}}, "base_model.revison: unknown key; did you mean 'revision'?"),
    ({"base_model": {"model": {"path": "a", "revison": "b"}}}, "base_model.model.revison: unknown key; did you mean"),
    ({"base_model": {"path": "a", "model": "b"}}, "base_model.path: unknown key; known: "),
    (
        {"base_model": {"model": {"path": "a"}, "revision": "b"}},
        "base_model: expected {path: PATH, revision: REVISION}",
    ),
    ({"base_model": {"path": "a", "lora": 5}}, "base_model.lora: expected a path or a hub id, found 5"),
    (
        {"base_model": {"model": "a", "override_architecture": "X"}},
        "base_model.override_architecture: has no use here, the tensors come from the checkpoints; leave it out",
    ),
    ({"models": [{"model": {"revision": "b"}}]}, "models[0].model: expected {path: PATH, revision: REVISION}"),
    (
        {"models": [{"model": {"path": "a", "revision": 3}}]},
        "models[0].model: expected {path: PATH, revision: REVISION}",
    ),
    (
        {"models": [{"model": "a"}, {"model": "b"}, {"model": "a"}]},
        "models[2]: a is listed twice, models[0] is the same; remove one",
    ),
    ({"models": [{"model": "a", "parameters": 3}]}, "models[0].parameters: expected a mapping of parameters, found 3"),
    (
        {"models": [{"model": "a", "parameters": {"weight": [[1]]}}]},
        "models[0].parameters.weight[0]: expected a number",
    ),
    ({"base_model": 1.5}, "base_model: expected a path or a hub id, found 1.5"),
    ({"parameters": ["weight"]}, "parameters: expected a mapping of parameters, found ['weight']"),
    (
        {"parameters": {"weight": [1, {"filter": "x", "value": 2}]}},
        "parameters.weight[1]: expected a number, true/false or text",
    ),
    (
        {"parameters": {"weight": [{"value": 2}, 1]}},
        "parameters.weight[1]: expected {filter: TEXT, value: ...}, found 1",
    ),
    ({"parameters": {"weight": {"filter": "x"}}}, "parameters.weight: expected {filter: TEXT, value: ...}"),
    ({"parameters": {"weight": {"value": 1, "fliter": "x"}}}, "parameters.weight: expected {filter: TEXT, value: ...}"),
    ({"parameters": {"weight": {"value": 1, "filter": 3}}}, "parameters.weight.filter: expected text, found 3"),
    ({"parameters": {"weight": {"value": {"a": 1}}}}, "parameters.weight.value: expected a number, true/false or text"),
    (
        {"parameters": {"weight": {"value": [1, None]}}},
        "parameters.weight.value[1]: expected a number, true/false or text",
    ),
    ({"dtype": "int8"}, "dtype: 'int8': expected one of float32, float16, bfloat16, float64"),
    ({"dtype": ["float32"]}, "dtype: ['float32']: expected one of"),
    ({"out_dtype": "bf16"}, "out_dtype: 'bf16': expected one of"),
    ({"tokenizer": "union"}, "tokenizer: 'union'; expected {source: union, base or PATH, tokens: {...}}"),
    ({"tokenizer": {"token": 1}}, "tokenizer.token: unknown key; did you mean 'tokens'?"),
    (
        {"tokenizer": {"pad_to_multiple_of": 0}},
        "tokenizer.pad_to_multiple_of: 0; expected a whole number of at least 1",
    ),
    ({"tokenizer": {"tokens": ["x"]}}, "tokenizer.tokens: ['x']; expected a mapping {TOKEN: {source: PATH}}"),
    ({"tokenizer": {"tokens": {1: {}}}}, "tokenizer.tokens: 1: expected a token; write it in quotes"),
    ({"tokenizer": {"tokens": {"x": "a"}}}, "tokenizer.tokens.x: 'a'; expected {source: PATH, force: true or false}"),
    ({"tokenizer": {"tokens": {"x": {"sorce": 1}}}}, "tokenizer.tokens.x.sorce: unknown key; did you mean 'source'?"),
    ({"tokenizer": {"tokens": {"x": {"force": 1}}}}, "tokenizer.tokens.x.force: 1: expected true or false"),
    ({"tokenizer": {"tokens": {"x": {"force": True}}}}, "tokenizer.tokens.x.source: missing; force says that all"),
    ({"tokenizer": {"tokens": {"x": {"source": {"kind": "zeros"}}}}}, "tokenizer.tokens.x.source.kind: 'zeros': expe"),
    (
        {"tokenizer": {"tokens": {"x": {"source": {"kind": "zero", "model": "a"}}}}},
        "tokenizer.tokens.x.source.model: unknown key; known: kind",
    ),
    (
        {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a", "token": 3}}}}},
        "tokenizer.tokens.x.source: expected one of token, a text, and token_id, a whole number",
    ),
    ({"tokenizer_source": 5}, "tokenizer_source: expected a path or a hub id, found 5"),
    ({"compat": "mergkit"}, "compat: 'mergkit'; the only value is 'mergekit'"),
    ({"seed": -1}, "seed: -1; expected a whole number from 0"),
    ({"seed": True}, "seed: True; expected a whole number from 0"),
    ({"merge_methods": "x"}, "merge_methods: unknown key; did you mean 'merge_method'?"),
    ({"slice": []}, "slice: unknown key; did you mean 'slices'?"),
    ({"slices": [{"sources": []}]}, "slices: models is given too; write one of models, slices and modules"),
    ({"modules": {"a": {}}, "models": None}, "modules.a.models: missing; expected a list of {model: PATH, "),
    ({"modules": [1], "models": None}, "modules: [1]; expected a mapping {NAME: {models: [...]}}"),
    ({"modules": {"a": 1}, "models": None}, "modules.a: expected {models: [...]} or {slices: [...]}, found 1"),
    ({"modules": {"a": {"model": 1}}, "models": None}, "modules.a.model: unknown key; did you mean 'models'?"),
    (
        {"modules": {"a": {"models": MODELS, "slices": [1]}}, "models": None},
        "modules.a.slices: models is given too; write one of them",
    ),
    ({"slices": 1, "models": None}, "slices: 1; expected a list of {sources: [...]}"),
    ({"slices": [1], "models": None}, "slices[0]: expected {sources: [...]}, found 1"),
    ({"slices": [{"source": 1}], "models": None}, "slices[0].source: unknown key; did you mean 'sources'?"),
    ({"slices": [{"sources": []}], "models": None}, "slices[0].sources: missing; expected a list of {model: PATH, lay"),
    (
        {"slices": [{"sources": [{"model": "a"}]}], "models": None},
        "slices[0].sources[0].layer_range: None; expected [FIRST, END], layers FIRST to END - 1",
    ),
    (
        {"slices": [{"sources": [{"model": "a", "layer_range": [2, 1]}]}], "models": None},
        "slices[0].sources[0].layer_range: [2, 1]; expected [FIRST, END]",
    ),
    (
        {"slices": [{"sources": [{"model": "a", "layer_range": [0, True]}]}], "models": None},
        "slices[0].sources[0].layer_range: [0, True]; expected [FIRST, END]",
    ),
    (
        {"slices": [{"sources": [{"model": "a", "layer_rang": [0, 1]}]}], "models": None},
        "slices[0].sources[0].layer_rang: unknown key; did you mean 'layer_range'?",
    ),
    (
        {
            "slices": [{"sources": [{"model": m, "layer_range": [0, n]} for m, n in (("a", 1), ("b", 2))]}],
            "models": None,
        },
        "slices[0].sources[1].layer_range: 2 layers, slices[0].sources[0] has 1; all sources of a slice need as many",
    ),
    (
        {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}] * 2}], "models": None},
        "slices[0].sources[1]: a is listed twice, slices[0].sources[0] is the same; remove one",
    ),
    (
        {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}], "residual_weight": 1}], "models": None},
        "slices[0].residual_weight: no method has a use for it, nor has mergekit; leave it out",
    ),
    ({"chat_template": "chatlm"}, "chat_template: 'chatlm': no such template, and no Jinja; did you mean 'chatml'?"),
    ({"chat_template": "x" * 30}, "chat_template: 'xxx"),
    ({"chat_template": 5}, "chat_template: 5: expected auto, alpaca, chatml, exaone, llama3, mistral or a Jinja"),
    ({"tokenizers": {}}, "tokenizers: unknown key; did you mean 'tokenizer'?"),
]


class TestMistakes:
    @pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
    def test_are_named_by_their_path(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as e:
            load({**RECIPE, **change})
        assert str(e.value).startswith(message)
        assert "\n" not in str(e.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "merge_method: linear\ndtype: a\nmodels: []\ndtype: b\n",
                "recipe:4: not valid YAML: key 'dtype' is given twice",
            ),
            ("models:\n - {model: a, model: b}\n", "recipe:2: not valid YAML: key 'model' is given twice"),
            ("merge_method: [linear\n", "recipe:2: not valid YAML: "),
            ("- a\n- b\n", "recipe: a recipe is a mapping with merge_method and models, found list"),
            ("\n", "recipe: a recipe is a mapping with merge_method and models, found NoneType"),
            (
                "dtype: !!python/object/apply:os.abort []\n",
                "recipe:1: not valid YAML: could not determine a constructor",
            ),
            ("dtype: 2024-13-45\n", "recipe: not valid YAML: month must be in 1..12"),
            ("dtype: !!int ''\n", "recipe: not valid YAML: "),
            ("dtype: !!bool maybe\n", "recipe: not valid YAML: "),
            ("dtype: !!timestamp now\n", "recipe: not valid YAML: "),
            ("dtype: " + "9" * 5000 + "\n", "recipe: not valid YAML: Exceeds the limit"),
            (
                "dtype: 0x" + "f" * 9000 + "\nmerge_method: a\nmodels: [{model: a}]",
                "dtype: a number of thousands of digits",
            ),
            ("? 0x" + "f" * 9000 + "\n: 1\n", "a number of thousands of digits: unknown key; known: "),
            ("dtype: a\0b\n", "recipe: not valid YAML: unacceptable character #x0000"),
            ("dtype: a\ud800b\n", "recipe: not valid YAML: unacceptable character #xd800"),
            ("models: " + "[" * 20_000 + "]" * 20_000, "recipe: not valid YAML: maximum recursion depth exceeded"),
            ("models: " + "{a: " * 20_000 + "}" * 20_000, "recipe: not valid YAML: maximum recursion depth exceeded"),
            ("? [a, b]\n: c\n", "recipe:1: not valid YAML: found unhashable key"),
            ("&a [*a]: c\n", "recipe:1: not valid YAML: "),
            ("models: &a\n- *a\nmerge_method: linear\n", "models[0]: expected {model: PATH"),
        ],
    )
    def test_of_yaml_are_named_by_their_line(self, text: str, message: str) -> None:
        with pytest.raises(ConfigError) as e:
            load(text)
        assert str(e.value).startswith(message)
        assert "\n" not in str(e.value)

    def test_in_a_file_are_named_by_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "recipe.yml"
        file.write_text("a: 1\na: 2\n")
        with pytest.raises(ConfigError, match=rf"^{file}:2: not valid YAML: key 'a' is given twice$"):
            load(file)
        file.write_bytes(b"a: \xff\n")
        with pytest.raises(ConfigError, match=rf"^{file}: recipe is not UTF-8 text; save it as such$"):
            load(file)

    def test_of_file_names(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=rf"^{tmp_path}: recipe cannot be read: Is a directory; correct the path$"
        ):
            load(tmp_path)
        with pytest.raises(
            ConfigError, match=r"^no/such.yml: recipe cannot be read: No such file or directory; correct the path$"
        ):
            load("no/such.yml")
        with pytest.raises(ConfigError, match=r"x: recipe cannot be read: File name too long; correct the path$"):
            load("x" * 5000)
        with pytest.raises(
            ConfigError, match=r"^a\\x00b: recipe cannot be read: embedded null byte; correct the path$"
        ):
            load("a\0b")

    def test_aliases_do_not_multiply(self) -> None:
        # Nine to the ninth entries if anything walked or printed them all.
        lines = ["merge_method: linear", "parameters:", "  a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
        lines += [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
        lines += ["models: [{model: *a8}]"]
        begin = time.monotonic()
        with pytest.raises(ConfigError, match=r"^models\[0\].model: expected a path or a hub id, found \[\["):
            load("\n".join(lines))
        assert time.monotonic() - begin < 5

    def test_many_keys_are_no_work(self) -> None:
        begin = time.monotonic()
        with pytest.raises(ConfigError, match="key 'k0' is given twice"):
            load("".join(f"k{i}: 1\n" for i in range(5000)) + "k0: 2\n")
        assert time.monotonic() - begin < 5


def test_every_message_is_one_printable_line() -> None:
    with pytest.raises(ConfigError) as e:
        load({**RECIPE, "line\nbreak\x1b[2J\ud800": 1})
    assert str(e.value).startswith(r"line\nbreak\x1b[2J\ud800: unknown key; ")
    with pytest.raises(ConfigError) as e:
        load({**RECIPE, "models": [{"model": "+" + "x" * 10_000}]})
    assert len(str(e.value)) == 1000
    assert str(e.value).endswith("maybe with +ADAPTER")


def test_the_docs_list_every_key_and_every_parameter_with_its_default() -> None:
    text = (Path(__file__).parents[1] / "docs" / "config.md").read_text(encoding="utf-8")
    keys, *sections = text.split("### ")
    assert tuple(re.findall(r"^\| `(\w+)` \|", keys, re.MULTILINE)) == KEYS
    listed = {
        name: re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", s, re.MULTILINE)
        for s in sections
        for name in re.findall(r"`(\w+)`", s.partition("\n")[0])
    }
    expected = {}
    for name, method in methods().items():
        expected[name] = [
            (
                p.name,
                "all" if p.scope == "shared" else "each model",
                "required" if p.required else str(p.default).lower(),
            )
            for p in method.params
        ]
    assert {k: sorted(v) for k, v in listed.items()} == {k: sorted(v) for k, v in expected.items()}


def test_the_docs_name_the_keys_inside_of_others() -> None:
    text = (Path(__file__).parents[1] / "docs" / "config.md").read_text(encoding="utf-8")
    source = (Path(__file__).parents[1] / "seme" / "config.py").read_text(encoding="utf-8")
    listed = re.findall(r"_check_keys\(\w+, \(([^)]*)\)", source)
    keys = {key for found in listed for key in re.findall(r'"(\w+)"', found)} - {"filter"}
    assert {"layer_range", "residual_weight", "pad_to_multiple_of", "token_id", "lora", "revision"} <= keys
    assert not {key for key in keys if not re.search(rf"\b{key}\b", text)}


def test_suggestions() -> None:
    assert suggest("densty", ["density", "weight"]) == "; did you mean 'density'?"
    assert suggest("zzz", ["weight", "density"]) == "; known: density, weight"


def test_values_in_messages_are_short_whatever_they_are() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, "x" * 10**6, 1 << 10**5, list(range(10**6)), {"a" * 1000: "b" * 1000}):
        assert len(brief(value)) <= 100
        assert "\n" not in brief(value)


def test_options_overrule_the_recipe_and_are_written_into_it() -> None:
    config = load("merge_method: linear  # soup\nmodels: [{model: a}]\nseed: 3\n")
    assert override(config, seed=None, compat=None) is config
    changed = override(config, seed=5, compat="mergekit")
    assert (changed.seed, changed.compat) == (5, "mergekit")
    assert load(changed.source) == changed
    with pytest.raises(ConfigError, match="seed: -1; expected a whole number"):
        override(config, seed=-1)
