"""seme/plan.py: what is decided, and refused, before the first byte is written."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from seme import plan as planning
from seme.config import load
from seme.engine import Options
from seme.errors import CheckpointError, ConfigError, SemeError, TargetError
from seme.merging import ready
from seme.plan import SAME_TENSORS, Plan, TensorPlan
from seme.report.plan import plan_as_text
from seme.sources import Gathered, Rows, StoredTensor

from .checkpoints import CONFIG, decoder, tokenizer, write

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, a and b, alike but for their values; the folder is the current one."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        write(Path(name), decoder(seed))
    return tmp_path


def plan(target: Path | None = None, overwrite: bool = False, **recipe: Any) -> Plan:
    recipe = {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": 1}, **recipe}
    recipe["models"] = [{"model": m} if isinstance(m, str) else m for m in recipe["models"]]
    made = planning.make(load(recipe), target, overwrite=overwrite)
    made.close()
    return made


def tensor(made: Plan, name: str) -> TensorPlan:
    return next(t for t in made.tensors if t.name == name)


def arguments(made: Plan, name: str) -> Any:
    return tensor(made, name).arguments


class TestParameters:
    def test_gradients_run_over_the_layers_and_elsewhere_give_their_first_value(self, models: Path) -> None:
        made = plan(merge_method="slerp", models=["a"], base_model="base", parameters={"t": [0, 0.5, 1]})
        values = {t.name: t.arguments["t"] for t in made.tensors}
        for i, expected in enumerate((0, 0.5, 1)):
            assert {v for n, v in values.items() if f"layers.{i}." in n} == {expected}
        assert values[EMBED] == values[HEAD] == values[NORM] == 0

    def test_the_only_layer_is_the_last(self, models: Path) -> None:
        for seed, name in enumerate(("base", "a")):
            write(Path(name), decoder(seed, layers=1))
        made = plan(merge_method="slerp", models=["a"], base_model="base", parameters={"t": [0, 1]})
        assert arguments(made, "model.layers.0.mlp.up_proj.weight")["t"] == 1
        assert arguments(made, EMBED)["t"] == 0

    def test_every_stack_has_a_depth_of_its_own(self, tmp_path: Path) -> None:
        names = [
            "vision.blocks.0.w",
            "vision.blocks.1.w",
            *(f"h.{i}.experts.{j}.w" for i in range(5) for j in range(2)),
        ]
        for name in ("a", "b"):
            write(tmp_path / name, {n: torch.ones(2) for n in names})
        entries = [{"model": str(tmp_path / n)} for n in ("a", "b")]
        made = plan(models=entries, parameters={"weight": [0, 1], "normalize": False})
        depth = {t.name: t.arguments["weight"][0] for t in made.tensors}
        assert [depth[f"vision.blocks.{i}.w"] for i in (0, 1)] == [0, 1]
        assert [depth[f"h.{i}.experts.{j}.w"] for i in range(5) for j in range(2)] == [
            i / 4 for i in range(5) for _ in range(2)
        ]

    def test_filters_choose_by_the_tensors_name(self, models: Path) -> None:
        weight = [{"filter": "mlp", "value": 1}, {"filter": "layers.1.", "value": [0, 1]}, {"value": 3}]
        made = plan(parameters={"weight": weight})
        assert arguments(made, "model.layers.0.mlp.up_proj.weight")["weight"] == [1, 1]
        assert arguments(made, "model.layers.1.self_attn.q_proj.weight")["weight"] == [0.5, 0.5]
        assert arguments(made, NORM)["weight"] == [3, 3]

    def test_an_entrys_parameter_goes_before_the_top_levels_goes_before_the_default(self, models: Path) -> None:
        entries = [
            {"model": "a", "parameters": {"weight": 2, "density": {"filter": "mlp", "value": 0.5}}},
            {"model": "b"},
        ]
        made = plan(merge_method="ties", models=entries, base_model="base", parameters={"weight": 7})
        up = arguments(made, "model.layers.0.mlp.up_proj.weight")
        assert (up["weight"], up["density"], up["normalize"], up["lambda_"]) == ([2, 7], [0.5, 1.0], True, 1.0)
        assert arguments(made, NORM)["density"] == [1.0, 1.0]  # no condition matches: on to the next scope
        made = plan(merge_method="ties", models=entries, base_model="base", parameters={"weight": 7, "density": 0.25})
        assert arguments(made, "model.layers.0.mlp.up_proj.weight")["density"] == [0.5, 0.25]
        assert arguments(made, NORM)["density"] == [0.25, 0.25]

    def test_written_numbers_become_numbers(self, models: Path) -> None:
        made = plan(
            merge_method="ties", base_model="base", parameters={"weight": "1e-5", "lambda": "2", "normalize": 0}
        )
        found = arguments(made, NORM)
        assert (found["weight"], found["lambda_"], found["normalize"]) == ([1e-5, 1e-5], 2.0, False)

    def test_a_base_that_is_not_listed_comes_last(self, models: Path) -> None:
        made = plan(merge_method="ties", base_model="base")
        assert [m.ref.path for m in made.models] == ["a", "b", "base"]
        assert tensor(made, NORM).group.base == 2
        assert tensor(made, NORM).group.experts == (0, 1)
        assert [s.file.parent.name for s in tensor(made, NORM).sources] == ["a", "b", "base"]
        assert made.donor == 2

    def test_a_base_that_is_listed_stays_where_it_is_and_needs_no_weight(self, models: Path) -> None:
        entries = [{"model": "base"}, {"model": "a", "parameters": {"weight": 1}}]
        made = plan(merge_method="ties", models=entries, base_model="base", parameters={})
        assert [m.ref.path for m in made.models] == ["base", "a"]
        assert tensor(made, NORM).group.base == 0
        assert arguments(made, NORM)["weight"] == [1]

    def test_in_whatever_spelling(self, models: Path) -> None:
        Path("link").symlink_to("base")
        for spelling in ("./base", "base/", str(models / "base"), "link", "a/../base"):
            made = plan(merge_method="ties", models=["base", "a"], base_model=spelling)
            assert [m.ref.path for m in made.models] == ["base", "a"]
            assert tensor(made, NORM).group.base == 0

    def test_a_revision_is_no_spelling(self, models: Path) -> None:
        with pytest.raises(CheckpointError, match=r"^a@v1: a is here, as a local path without revisions"):
            plan(merge_method="ties", models=["a", "b"], base_model="a@v1")

    def test_a_method_without_base_takes_it_as_one_more_input(self, models: Path) -> None:
        made = plan(base_model="base")
        assert tensor(made, NORM).group.base is None
        assert arguments(made, NORM)["weight"] == [1, 1, 1]
        assert made.donor == 2
        with pytest.raises(ConfigError, match=r"^base: weight: missing; weight of the model"):
            plan(models=[{"model": "a", "parameters": {"weight": 1}}], base_model="base", parameters={})

    def test_without_a_base_the_first_model_is_the_donor(self, models: Path) -> None:
        assert plan().donor == 0


class TestRecipeMistakes:
    @pytest.mark.parametrize(
        ("recipe", "message"),
        [
            ({"merge_method": "tie"}, "merge_method: unknown method 'tie'; did you mean 'ties'?"),
            ({"merge_method": "ties"}, "base_model: missing; ties works relative to it: add base_model: PATH"),
            ({"merge_method": "slerp", "base_model": "base"}, "models: slerp takes 2 models, base included; found 3"),
            ({"merge_method": "slerp", "models": ["base"], "base_model": "base"}, "models: slerp takes 2 models"),
            ({"parameters": {"wieght": 1}}, "parameters.wieght: linear has no such parameter; did you mean 'weight'?"),
            (
                {"models": [{"model": "a", "parameters": {"densty": 1}}], "merge_method": "ties", "base_model": "base"},
                "models[0].parameters.densty: ties has no such parameter; did you mean 'density'?",
            ),
            (
                {"models": ["b", {"model": "a", "parameters": {"normalize": True}}]},
                "models[1].parameters.normalize: shared by all models; move it to the top-level parameters",
            ),
            (
                {"parameters": {}},
                "a: weight: missing; weight of the model.",
            ),
            (
                {"parameters": {"weight": {"filter": "mlp", "value": 1}}},
                "a: weight: missing for tensor lm_head.weight; weight: weight of the model.",
            ),
            (
                {"merge_method": "slerp", "models": ["a"], "base_model": "base", "parameters": {}},
                "parameters.t: missing; 0 gives the base model",
            ),
            ({"parameters": {"weight": "much"}}, "parameters.weight: 'much': expected a finite number"),
            ({"parameters": {"weight": [1, "x"]}}, "parameters.weight: 'x': expected a finite number"),
            (
                {"parameters": {"weight": 1, "normalize": "perhaps"}},
                "parameters.normalize: 'perhaps': expected true or",
            ),
            (
                {"parameters": {"weight": {"filter": "no such", "value": "x"}}},
                "parameters.weight: 'x': expected a finite",
            ),
            (
                {"merge_method": "ties", "base_model": "base", "parameters": {"weight": 1, "density": [0.5, 50]}},
                "parameters.density: 50.0; expected a number from 0 to 1",
            ),
            (
                {
                    "merge_method": "task_arithmetic",
                    "base_model": "base",
                    "models": [{"model": "a", "parameters": {"weight": 1, "density": -1}}],
                },
                "models[0].parameters.density: -1.0; expected a number from 0 to 1",
            ),
            ({"models": ["a", "none/such"]}, "none/such: no such folder in "),
        ],
    )
    def test_are_named(
        self, recipe: dict[str, Any], message: str, models: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(SemeError) as e:
            plan(target=Path("out"), **recipe)
        assert str(e.value).startswith(message)
        assert sorted(os.listdir()) == ["a", "b", "base"]

    @pytest.mark.parametrize(
        ("recipe", "message"),
        [
            ({"parameters": {"wieght": 1}}, "parameters.wieght: linear has no such parameter"),
            ({"parameters": {"weight": "much"}}, "parameters.weight: 'much': expected a finite number"),
            ({"parameters": {}}, "hub/model: weight: missing"),
            ({"merge_method": "seme", "base_model": "a", "parameters": {"rho": 2}}, "parameters.rho: 2.0; expected a "),
            ({"models": ["hub/model", "./none"]}, "./none: no such file or folder in "),
            ({"target": Path("full")}, "full: not empty; "),
            ({"target": Path("a/sub")}, "a/sub: is, holds or lies in the input model a"),
        ],
    )
    def test_are_found_before_anything_is_downloaded(
        self, recipe: dict[str, Any], message: str, models: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("full").mkdir()
        Path("full/x").touch()
        asked = []
        monkeypatch.setattr(planning, "resolve", lambda ref: asked.append(ref))
        with pytest.raises(SemeError) as e:
            plan(**{"models": ["hub/model", "a"], **recipe})
        assert str(e.value).startswith(message)
        assert not asked


class TestWeights:
    """Those that a formula cannot be computed with."""

    @pytest.mark.parametrize(
        ("weights", "recipe", "message"),
        [
            (
                (1, -1),
                {},
                "1.0, -1.0 add up to 0 for tensor lm_head.weight, and normalize divides by it; set normalize",
            ),
            ((0, 0), {}, "0.0, 0.0 add up to 0 for tensor lm_head.weight"),
            ((0.7, -0.7000000001), {}, "0.7, -0.7000000001 add up to 0 for tensor lm_head.weight"),
            ((1e-50, 1e-50), {}, "1e-50, 1e-50 add up to 0 for tensor lm_head.weight"),
            ((3e38, 3e38), {}, "3e+38, 3e+38 add up to inf for tensor lm_head.weight"),
            (
                (1e300, 1),
                {},
                "1e+300 is infinite in float32, as tensor lm_head.weight is merged; write a smaller number",
            ),
            ((1e300, 1), {"normalize": False}, "1e+300 is infinite in float32"),
            ((1, -1), {"merge_method": "task_arithmetic", "normalize": True}, "1.0, -1.0 add up to 0 for tensor"),
            ((7e4, 1), {"merge_method": "ties", "dtype": "float16"}, "70000.0 is infinite in float16"),
            ((1e300, 1), {"merge_method": "iso_c"}, "1e+300 is infinite in float32"),
        ],
    )
    def test_are_refused(self, weights: Any, recipe: dict[str, Any], message: str, models: Path) -> None:
        with pytest.raises(ConfigError) as e:
            self.plan(weights, **recipe)
        assert str(e.value).startswith(f"parameters.weight: {message}")

    @pytest.mark.parametrize(
        ("weights", "recipe"),
        [
            ((1, -1), {"normalize": False}),
            ((1, -1), {"merge_method": "task_arithmetic"}),
            ((1, -1), {"merge_method": "ties"}),  # divided by is what agrees, element by element, or 1
            ((1, -1), {"merge_method": "breadcrumbs_ties", "normalize": True}),
            ((1, -1), {"merge_method": "dare_ties", "normalize": True}),
            ((1, -1), {"merge_method": "della"}),
            ((1, -1), {"merge_method": "task_arithmetic", "normalize": True, "compat": "mergekit"}),
            ((0, 0), {"merge_method": "task_arithmetic", "normalize": True}),  # the base model
            ((0, 0), {"merge_method": "ties"}),
            ((1, -0.999), {}),
            ((7e4, 1), {"dtype": "float16"}),  # held in float32
            ((1e300, 1), {"dtype": "float64"}),
        ],
    )
    def test_are_fine(self, weights: Any, recipe: dict[str, Any], models: Path) -> None:
        self.plan(weights, **recipe)

    def test_other_numbers_are_named(self, models: Path) -> None:
        with pytest.raises(ConfigError, match=r"^parameters.lambda: -1e\+300 is infinite in float32"):
            self.plan((1, 1), merge_method="ties", **{"lambda": -1e300})

    @staticmethod
    def plan(
        weights: Any,
        merge_method: str = "linear",
        dtype: str | None = None,
        compat: str | None = None,
        **parameters: Any,
    ) -> Plan:
        entries = [{"model": m, "parameters": {"weight": w}} for m, w in zip("ab", weights)]
        base = "base" if merge_method != "linear" else None
        return plan(
            merge_method=merge_method,
            models=entries,
            base_model=base,
            dtype=dtype,
            compat=compat,
            parameters=parameters,
        )


class TestDtypes:
    @pytest.mark.parametrize(
        ("stored", "recipe", "compute", "out"),
        [
            ((torch.bfloat16, torch.bfloat16), {}, "float32", "bfloat16"),
            ((torch.bfloat16, torch.float16), {}, "float32", "float32"),
            ((torch.float64, torch.float16), {}, "float64", "float64"),
            ((torch.bfloat16, torch.bfloat16), {"compat": "mergekit"}, "bfloat16", "bfloat16"),
            ((torch.bfloat16, torch.bfloat16), {"dtype": "float32"}, "float32", "float32"),
            ((torch.bfloat16, torch.bfloat16), {"dtype": "float32", "out_dtype": "float16"}, "float32", "float16"),
            ((torch.float32, torch.float32), {"out_dtype": "bfloat16"}, "float32", "bfloat16"),
            ((torch.float32, torch.float32), {"dtype": "bfloat16"}, "bfloat16", "bfloat16"),
        ],
    )
    def test_of_computing_and_of_the_output(
        self, stored: tuple[torch.dtype, ...], recipe: dict[str, Any], compute: str, out: str, models: Path
    ) -> None:
        for seed, (name, dtype) in enumerate(zip("ab", stored)):
            write(Path(name), decoder(seed, dtype))
        made = plan(**recipe)
        group = tensor(made, NORM).group
        assert (group.compute_dtype.name, group.out_dtype.name, made.out_dtype.name) == (compute, out, out)
        assert tensor(made, NORM).spec.dtype.name == out

    def test_of_the_output_as_a_whole_is_that_of_most_elements(self, models: Path) -> None:
        for seed, name in enumerate("ab"):
            mixed = {k: v.bfloat16() if "proj" in k or "head" in k else v for k, v in decoder(seed).items()}
            write(Path(name), mixed)
        made = plan()
        assert made.out_dtype.name == "bfloat16"
        assert tensor(made, NORM).spec.dtype.name == "float32"


class TestTensors:
    def test_come_in_the_order_of_the_donors_file(self, models: Path) -> None:
        made = plan(base_model="base")
        donor = made.models[made.donor].checkpoint
        assert [t.name for t in made.tensors] == list(donor.tensors)
        assert made.layout.slots.keys() == donor.tensors.keys()

    def test_numbers_of_the_plan(self, models: Path) -> None:
        made = plan()
        size = sum(t.numel() * 4 for t in decoder(0).values())
        assert made.bytes_read == 2 * size
        assert made.layout.total_size == size
        assert made.bytes_written == size + len(made.layout.headers[0])

    def test_that_one_model_lacks(self, models: Path) -> None:
        tensors = decoder(1)
        del tensors[NORM], tensors["model.layers.1.mlp.up_proj.weight"]
        write(Path("b"), tensors)
        with pytest.raises(CheckpointError) as e:
            plan()
        assert str(e.value) == (
            "b: tensor model.layers.1.mlp.up_proj.weight (and 1 more) is missing, a/model.safetensors has it; "
            f"{SAME_TENSORS}"
        )

    def test_that_one_model_has_too_many(self, models: Path) -> None:
        write(Path("b"), {**decoder(1), "extra.weight": torch.ones(3)})
        with pytest.raises(CheckpointError) as e:
            plan()
        assert str(e.value) == (f"b/model.safetensors: tensor extra.weight is not in a; {SAME_TENSORS}")

    def test_whose_shapes_differ_are_named_with_both_files(self, models: Path) -> None:
        write(Path("b"), {**decoder(1), NORM: torch.ones(9)})
        with pytest.raises(CheckpointError) as e:
            plan()
        assert str(e.value) == (
            "b/model.safetensors: tensor model.norm.weight has shape [9], [8] in a/model.safetensors; "
            "only models of one shape merge"
        )
        write(Path("b"), decoder(1, vocab=19))
        with pytest.raises(CheckpointError) as e:
            plan()
        assert str(e.value) == (
            "b/model.safetensors: tensor lm_head.weight has shape [19, 8], [17, 8] in a/model.safetensors; "
            "vocabularies differ: add tokenizer_source: base, or union for the tokens of all models"
        )

    def test_of_equal_size_but_other_shape(self, models: Path) -> None:
        write(Path("b"), {**decoder(1), NORM: torch.ones(2, 4)})
        with pytest.raises(CheckpointError, match=r"has shape \[2, 4\], \[8\] in "):
            plan()

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
    def test_that_are_not_floating_point_are_copied_if_equal(self, dtype: torch.dtype, models: Path) -> None:
        for seed, name in enumerate("ab"):
            write(Path(name), {**decoder(seed), "ids": torch.ones(5).to(dtype)})
        made = plan(dtype="bfloat16")
        assert tensor(made, "ids").copy
        assert tensor(made, "ids").spec.dtype.to_torch() == dtype
        assert tensor(made, "ids").arguments == {}
        assert not tensor(made, NORM).copy
        write(Path("b"), {**decoder(1), "ids": torch.tensor([1, 1, 1, 1, 0]).to(dtype)})
        with pytest.raises(CheckpointError) as e:
            plan()
        name = str(dtype).removeprefix("torch.")
        remedy = "tensors that are not floating point are copied and must be equal in all models; take them from one"
        if dtype == torch.float8_e4m3fn:
            remedy = "float8_e4m3fn is copied, not merged; convert the models to bfloat16 first"
        assert str(e.value) == (
            f"b/model.safetensors: tensor ids ({name}) differs from a/model.safetensors ({name}); {remedy}"
        )

    def test_that_are_integers_here_and_floats_there(self, models: Path) -> None:
        for name, dtype in (("a", torch.float32), ("b", torch.int32)):
            write(Path(name), {**decoder(0), "ids": torch.zeros(5, dtype=dtype)})
        with pytest.raises(CheckpointError, match=r"^b/model.safetensors: tensor ids \(int32\) differs from a/"):
            plan()

    def test_larger_than_one_piece_are_compared_to_their_end(self, models: Path) -> None:
        ids = torch.zeros((1 << 22) + 5, dtype=torch.uint8)
        write(Path("a"), {"ids": ids, "x": torch.zeros(1)})
        ids[-1] = 1
        write(Path("b"), {"ids": ids, "x": torch.zeros(1)})
        with pytest.raises(CheckpointError, match="tensor ids"):
            plan()

    def test_that_transformers_recomputes_are_left_out_with_a_note(self, models: Path) -> None:
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        write(Path("a"), {**decoder(0), name: torch.ones(4)})
        made = plan()
        assert name not in [t.name for t in made.tensors]
        assert made.notes == (f"{name} of a: left out, transformers computes it",)
        write(Path("b"), {**decoder(1), name: torch.ones(4)})
        made = plan()
        assert name in [t.name for t in made.tensors]
        assert made.notes == ()

    def test_that_a_pickle_holds_twice_are_left_out_with_a_note(self, models: Path) -> None:
        bias = torch.arange(4.0)
        names = ("cls.predictions.bias", "cls.predictions.decoder.bias")
        write(Path("a"), {names[0]: bias})
        Path("b/model.safetensors").unlink()
        write(Path("b"), dict.fromkeys(names, bias), layout="bin")
        for entries in (["a", "b"], ["b", "a"]):
            made = plan(models=entries)
            assert [t.name for t in made.tensors] == [names[0]]
            assert made.notes == (f"{names[1]} of b: left out, it is {names[0]} again",)
        for other in (bias.clone(), torch.cat([bias, bias])[4:]):  # equal, but not one memory
            write(Path("b"), dict(zip(names, (bias, other))), layout="bin")
            with pytest.raises(CheckpointError, match=r"tensor cls\.predictions\.decoder\.bias is not in a"):
                plan()
        square = torch.arange(4.0).view(2, 2)
        write(Path("a"), {names[0]: square})
        for other in (square.t(), square.view(4), square[:1]):  # one memory, but not the same tensor
            write(Path("b"), dict(zip(names, (square, other))), layout="bin")
            with pytest.raises(CheckpointError, match=r"tensor cls\.predictions\.decoder\.bias is not in a"):
                plan()
        write(Path("a"), dict(zip(names, (bias, bias + 1))))
        write(Path("b"), dict.fromkeys(names, bias), layout="bin")
        made = plan()
        assert [t.name for t in made.tensors] == list(names)
        assert made.notes == ()

    def test_one_that_only_one_model_has_is_named_beside_copies_of_a_tied_head(self, models: Path) -> None:
        for seed, name in enumerate(("a", "b")):
            tensors = decoder(seed, head=False)
            tensors[HEAD] = tensors[EMBED].clone()
            other = {"other.weight": torch.ones(2)} if name == "b" else {}
            write(Path(name), {**tensors, **other}, {**CONFIG, "tie_word_embeddings": True})
        with pytest.raises(CheckpointError, match=r"^b/model.safetensors: tensor other.weight is not in a; "):
            plan()


def work(config: dict[str, Any], models: list[str], scratch: Path) -> int:
    """Calls of functions, C ones included, that planning takes; imports and caches made before do not count."""
    recipe = load({"models": [{"model": m} for m in models], **config} if "slices" not in config else config)

    def once() -> None:
        made = planning.make(recipe, scratch)
        made.close()
        place = ready(made, Options(), "cpu", "cpu")
        plan_as_text(made, Options(), place)

    once()
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        once()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(
    "config",
    [
        {"merge_method": "linear", "parameters": {"weight": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 1}]}},
        {"merge_method": "linear", "parameters": {"weight": 1}, "tokenizer_source": "union"},
        {"merge_method": "seme", "base_model": "base"},
        {"merge_method": "linear", "parameters": {"weight": 1}, "slices": 1},
    ],
)
def test_the_work_grows_with_the_number_of_tensors(config: dict[str, Any], models: Path) -> None:
    counts = []
    for layers in (12, 36):
        for seed, name in enumerate(("base", "a", "b")):
            write(Path(name), decoder(seed, layers=layers), {**CONFIG, "num_hidden_layers": layers})
            tokenizer(Path(name), [f"t{i}" for i in range(17)])
        if "slices" in config:  # one for each layer
            sources = [[{"model": m, "layer_range": [i, i + 1]} for m in ("a", "b")] for i in range(layers)]
            config = {**config, "slices": [{"sources": s} for s in sources]}
        counts.append(work(config, ["a", "b"], models / "out"))
    # Three times as many layers; what does not depend on their number only makes it less.
    assert counts[1] <= 3 * counts[0]


class TestConfigs:
    def notes(self, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
        for seed, (name, config) in enumerate((("a", a), ("b", b))):
            write(Path(name), decoder(seed), {**CONFIG, **config})
        return list(plan().notes)

    def test_that_differ_are_noted(self, models: Path) -> None:
        assert self.notes({"rms_norm_eps": 1e-5, "rope_theta": 1e4}, {"rms_norm_eps": 1e-6, "rope_theta": 5e5}) == [
            "config.json of b: rms_norm_eps is 1e-06; the output takes 1e-05 from a",
            "config.json of b: rope_theta is 500000.0; the output takes 10000.0 from a",
        ]
        assert self.notes({}, {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}) == [
            "config.json of b: architectures is ['MistralForCausalLM']; the output takes ['LlamaForCausalLM'] from a",
            "config.json of b: model_type is 'mistral'; the output takes 'llama' from a",
        ]
        assert self.notes({"text_config": {"hidden_act": "silu"}}, {"text_config": {"hidden_act": "gelu"}}) == [
            "config.json of b: text_config.hidden_act is 'gelu'; the output takes 'silu' from a"
        ]

    def test_are_compared_across_versions_of_transformers(self, models: Path) -> None:
        newer = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
        assert self.notes({"rope_theta": 10000}, newer) == []
        assert self.notes(newer, {"rope_theta": 5e5}) == [
            "config.json of b: rope_theta is 500000.0; the output takes 10000.0 from a"
        ]

    def test_may_differ_in_what_computes_nothing(self, models: Path) -> None:
        assert self.notes({}, {"torch_dtype": "bfloat16", "_name_or_path": "x", "use_cache": False}) == []


class TestFiles:
    def test_a_model_may_be_one_file(self, models: Path) -> None:
        tokenizer(Path("a"), ["x", "y"])
        made = plan(models=["a/model.safetensors", "b/model.safetensors"])
        assert [m.checkpoint.path.name for m in made.models] == ["a", "b"]
        assert made.tokenizer == Path("a")

    def test_errors_leave_no_file_open(self, models: Path) -> None:
        for seed, name in enumerate("ab"):
            write(Path(name), {**decoder(seed), "ids": torch.arange(5) + seed})
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(CheckpointError, match="tensor ids"):
            plan()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_nor_does_a_plan_that_was_closed(self, models: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for seed, name in enumerate("ab"):
            write(Path(name), {**decoder(seed), "ids": torch.arange(5)})
        plan()
        assert len(os.listdir("/proc/self/fd")) == before


class Case(NamedTuple):
    """A head in a donor and an expert: what config.json says of tying, and how the head is stored."""

    donor: tuple[bool | None, str]
    expert: tuple[bool | None, str]
    head: str | None
    """In the output: ``left out``, ``merged`` with the expert's head, ``with embedding``, or an error's words."""


KINDS = ("none", "copy", "own")
TIED = [
    # said, stored / said, stored
    Case((True, "none"), (True, "none"), "left out"),
    Case((True, "none"), (True, "copy"), "left out"),
    Case((True, "copy"), (True, "none"), "left out"),
    Case((True, "copy"), (True, "copy"), "left out"),
    Case((True, "none"), (None, "none"), "left out"),
    Case((None, "none"), (None, "none"), "left out"),
    Case((None, "none"), (None, "copy"), "left out"),
    Case((None, "none"), (True, "copy"), "left out"),
    Case((True, "none"), (False, "copy"), "left out"),
    Case((True, "none"), (False, "own"), "is not in a"),
    Case((None, "none"), (False, "own"), "is not in a"),
    Case((True, "copy"), (False, "own"), "is not in a"),
    Case((True, "none"), (True, "own"), "is not in a"),
    # A stored head that is no copy is a head, whatever config.json says; transformers loads it as one, too.
    Case((True, "own"), (True, "own"), "merged"),
    Case((True, "own"), (True, "none"), "with embedding"),
    Case((False, "own"), (False, "own"), "merged"),
    Case((False, "own"), (True, "none"), "with embedding"),
    Case((False, "own"), (None, "none"), "with embedding"),
    Case((False, "own"), (True, "copy"), "merged"),
    Case((False, "copy"), (False, "copy"), "merged"),
    Case((False, "own"), (False, "none"), "is missing"),
    Case((None, "own"), (None, "own"), "merged"),
    Case((None, "own"), (True, "none"), "with embedding"),
    Case((None, "copy"), (None, "copy"), "merged"),
]


def model(folder: str, seed: int, said: bool | None, stored: str, layout: str = "single") -> None:
    tensors = decoder(seed, head=stored == "own")
    if stored == "copy":
        tensors[HEAD] = tensors[EMBED] if layout == "bin" else tensors[EMBED].clone()
    config = {k: v for k, v in CONFIG.items() if k != "tie_word_embeddings"}
    if said is not None:
        config["tie_word_embeddings"] = said
    shutil.rmtree(folder, ignore_errors=True)
    write(Path(folder), tensors, config, layout)


class TestTiedHeads:
    def outcome(self) -> str:
        try:
            made = plan()
        except CheckpointError as e:
            return (
                "is not in a" if f"{HEAD} is not in a" in str(e) else "is missing" if "is missing" in str(e) else str(e)
            )
        heads = [t for t in made.tensors if t.name == HEAD]
        if not heads:
            return "left out"
        return "merged" if heads[0].sources[1].name == HEAD else "with embedding"

    @pytest.mark.parametrize("case", TIED, ids=lambda c: f"{c.donor}-{c.expert}")
    def test_every_case(self, case: Case, models: Path) -> None:
        model("a", 0, *case.donor)
        model("b", 1, *case.expert)
        assert self.outcome() == case.head

    def test_each_copy_left_out_is_noted(self, models: Path) -> None:
        model("a", 0, True, "copy")
        model("b", 1, True, "copy")
        assert plan().notes == tuple(f"{HEAD} of {m}: left out, it is the tied input embedding" for m in "ab")

    def test_one_memory_in_a_pickle_is_tied_without_a_config(self, models: Path) -> None:
        model("a", 0, None, "copy", "bin")
        model("b", 1, None, "copy", "bin")
        assert self.outcome() == "left out"
        model("b", 1, None, "own", "bin")
        assert self.outcome() == "is not in a"
        model("a", 0, False, "copy", "bin")  # unless it says otherwise
        assert self.outcome() == "merged"
        model("a", 0, None, "own", "bin")
        model("b", 1, None, "copy", "bin")
        assert self.outcome() == "merged"

    def test_a_nested_config_is_read(self, models: Path) -> None:
        for seed, name in enumerate("ab"):
            write(Path(name), decoder(seed, head=False), {"text_config": {"tie_word_embeddings": True}})
        write(Path("b"), decoder(1), {"text_config": {"tie_word_embeddings": True}})
        assert self.outcome() == "is not in a"
        write(Path("a"), decoder(0), {"text_config": {"tie_word_embeddings": False}})
        write(Path("b"), decoder(1, head=False), {"text_config": {"tie_word_embeddings": True}})
        assert self.outcome() == "with embedding"

    def test_a_head_of_another_shape_is_not_its_embedding(self, models: Path) -> None:
        # As in models that were given a classifier instead.
        model("a", 0, True, "none")
        write(Path("b"), {**decoder(1, head=False), HEAD: torch.zeros(5, 8)}, {**CONFIG, "tie_word_embeddings": True})
        assert self.outcome() == "is not in a"

    def test_a_base_that_is_the_donor_decides(self, models: Path) -> None:
        model("base", 2, True, "none")
        model("a", 0, True, "copy")
        model("b", 1, True, "none")
        made = plan(merge_method="ties", base_model="base")
        assert HEAD not in [t.name for t in made.tensors]
        assert made.notes == (f"{HEAD} of a: left out, it is the tied input embedding",)


class TestTargets:
    def refused(self, target: str | Path, message: str, **options: Any) -> None:
        before = sorted(str(p) for p in Path().rglob("*"))
        with pytest.raises(TargetError) as e:
            plan(target=Path(target), **options)
        assert str(e.value).startswith(message), str(e.value)
        assert sorted(str(p) for p in Path().rglob("*")) == before

    def test_that_are_fine(self, models: Path) -> None:
        Path("empty").mkdir()
        for target in ("out", "new/folder/out", "empty", str(models / "absolute")):
            plan(target=Path(target))
        assert not Path("out").exists()
        assert not Path("new").exists()

    def test_not_empty(self, models: Path) -> None:
        Path("out").mkdir()
        Path("out/x").touch()
        self.refused("out", "out: not empty; choose another folder or pass --overwrite")
        self.refused("out", "out: not a model (no config.json and no weights)", overwrite=True)
        Path("out/config.json").touch()
        plan(target=Path("out"), overwrite=True)

    @pytest.mark.parametrize("recipe", ["out/recipe.yml", "out/recipes/recipe.yml", "link/recipe.yml"])
    def test_that_hold_the_recipe(self, recipe: str, models: Path) -> None:
        Path("out/recipes").mkdir(parents=True)
        Path("link").symlink_to("out")
        Path(recipe).touch()
        config = load({"merge_method": "linear", "models": [{"model": "a"}], "parameters": {"weight": 1}})
        with pytest.raises(TargetError, match=rf"^out: holds the recipe {recipe}; choose another output folder$"):
            planning.make(config, Path("out"), overwrite=True, recipe=Path(recipe))
        planning.make(config, Path("out2"), recipe=Path(recipe)).close()

    def test_a_file(self, models: Path) -> None:
        Path("out").touch()
        for overwrite in (False, True):
            self.refused("out", "out: exists and is not a folder", overwrite=overwrite)

    @pytest.mark.parametrize("target", ["a", "./a", "b/", "base/../a", "link", "a/sub", "a/sub/sub", ".", ".."])
    def test_that_are_hold_or_lie_in_a_source(self, target: str, models: Path) -> None:
        Path("link").symlink_to("a")
        words = ": is, holds or lies in the input model "
        self.refused(target, f"{Path(target)}{words}", overwrite=True)

    def test_beside_an_input_that_is_one_file(self, models: Path) -> None:
        for name in ("a", "b"):
            Path(name, "model.safetensors").rename(f"{name}.safetensors")
        files = {"models": ["a.safetensors", "b.safetensors"]}
        for target in ("merged", str(models / "new" / "merged")):
            plan(target=Path(target), **files)
        self.refused(".", ".: is, holds or lies in the input model a.safetensors", overwrite=True, **files)
        self.refused("a.safetensors", "a.safetensors: is, holds or lies in the input model a.safetensors", **files)

    def test_that_hold_a_file_or_the_link_to_it(self, models: Path) -> None:
        Path("links").mkdir()
        Path("links/a.safetensors").symlink_to(models / "a" / "model.safetensors")
        files = {"models": ["links/a.safetensors"]}
        for target in ("a", "links"):
            words = f"{target}: is, holds or lies in the input model links/a.safetensors"
            self.refused(target, words, overwrite=True, **files)
        plan(target=Path("a/merged"), **files)

    def test_that_a_link_leads_to(self, models: Path) -> None:
        Path("link").symlink_to("b")
        plan(target=Path("out"), models=["a", "link"])
        self.refused("b", "b: is, holds or lies in the input model link", models=["a", "link"], overwrite=True)

    def test_below_a_file(self, models: Path) -> None:
        Path("file").touch()
        for target in ("file/out", "file/deep/out"):
            self.refused(target, f"{target}: {models / 'file'} is not a folder; choose another output folder")

    def test_without_permission(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(os, "access", lambda *asks: asked.append(asks))
        self.refused("new/out", f"new/out: {models} cannot be written to; choose another output folder")
        assert asked == [(models, os.W_OK | os.X_OK)]

    def test_without_space(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        needed = plan().bytes_written
        asked = []

        def usage(free: int) -> Callable[[Path], Any]:
            def disk_usage(path: Path) -> Any:
                asked.append(Path(path))
                return shutil._ntuple_diskusage(10**12, 0, free)  # type: ignore[attr-defined]

            return disk_usage

        monkeypatch.setattr(shutil, "disk_usage", usage(needed))
        plan(target=Path("new/out"))
        monkeypatch.setattr(shutil, "disk_usage", usage(needed - 1))
        self.refused("new/out", "new/out: the output needs 10.0 kB, 10.0 kB are free; make room")
        assert {p.resolve() for p in asked} == {models}


class TestTokenizers:
    def test_of_the_donor_by_default(self, models: Path) -> None:
        assert plan().tokenizer == Path("a")
        assert plan(base_model="base").tokenizer == Path("base")

    def test_of_another_source_with_the_same_vocabulary(self, models: Path) -> None:
        for name in ("a", "b", "base"):
            tokenizer(Path(name), ["x", "y"])
        assert plan(tokenizer_source="b").tokenizer == Path("b")
        assert plan(tokenizer_source="base", base_model="base").tokenizer == Path("base")
        assert plan(tokenizer_source="./b/").tokenizer == Path("b")
        file = "a/model.safetensors"
        assert plan(models=[file, "b"], tokenizer_source=file).tokenizer == Path("a")

    def test_of_a_folder_that_is_not_merged(self, models: Path) -> None:
        for name in ("a", "b", "base"):
            tokenizer(Path(name), ["x", "y"])
        Path("only").mkdir()
        tokenizer(Path("only"), ["y", "z"])
        made = plan(tokenizer_source="only")
        assert made.tokenizer == Path("only")
        assert made.model_config["vocab_size"] == 2

    def test_of_a_folder_that_is_not_there(self, models: Path) -> None:
        with pytest.raises(CheckpointError, match=r"^\./only: no such file or folder"):
            plan(tokenizer_source="./only")
        with pytest.raises(CheckpointError, match=r"^base@v1: base is here, as a local path without revisions"):
            plan(tokenizer_source="base@v1")

    def test_of_a_folder_without_one(self, models: Path) -> None:
        tokenizer(Path("a"), ["x", "y"])
        with pytest.raises(CheckpointError, match=r"^base: no tokenizer in it.*name a model that has one"):
            plan(tokenizer_source="./base")

    def test_is_not_written_over(self, models: Path) -> None:
        for name in ("a", "b", "base"):
            tokenizer(Path(name), ["x", "y"])
        with pytest.raises(TargetError, match=r"^base: is, holds or lies in the input model base"):
            plan(target=Path("base"), tokenizer_source="./base", overwrite=True)

    def test_with_a_token_of_a_model_that_is_not_merged(self, models: Path) -> None:
        with pytest.raises(ConfigError) as e:
            plan(tokenizer={"tokens": {"x": {"source": "base"}}})
        assert str(e.value) == "tokenizer.tokens.x.source: base is none of the models; expected one of a, b"

    @pytest.mark.parametrize("source", ["a", "base"])
    def test_that_are_missing_where_they_were_asked_for(self, source: str, models: Path) -> None:
        (Path("a") / "tokenizer_config.json").write_text("{}")
        tokenizer(Path("b"), ["x", "y"])
        with pytest.raises(CheckpointError) as e:
            plan(tokenizer_source=source)
        assert str(e.value) == (
            "a: no tokenizer in it, such as tokenizer.json; "
            "name a model that has one in tokenizer_source, or leave it out"
        )
        plan()

    def test_whose_vocabularies_differ_are_aligned(self, models: Path) -> None:
        tokenizer(Path("a"), [f"t{i}" for i in range(17)])
        tokenizer(Path("b"), [f"t{i}" for i in (1, 0, *range(2, 12), 20)])
        made = plan(tokenizer_source="a")
        own, gathered = tensor(made, EMBED).sources
        assert isinstance(own, StoredTensor)  # nothing to be done
        assert isinstance(gathered, Gathered)
        # One row of b each, two of a (t12 to t16 are a's alone).
        assert gathered.rows == Rows([0, 1, 2, 12, 17], [1, 1, 1, 0], [1, 0, 2, 12])
        assert all(isinstance(s, StoredTensor) for t in made.tensors if t.name not in (EMBED, HEAD) for s in t.sources)
        assert made.model_config["vocab_size"] == 17
        assert not made.tokenizer_files

    def test_rows_without_a_token_are_left_out(self, models: Path) -> None:
        for name in ("a", "b"):
            tokenizer(Path(name), [f"t{i}" for i in range(14)])
        for target, pad in ((14, 1), (16, 8), (20, 20)):
            made = plan(tokenizer={"source": "base", "pad_to_multiple_of": pad})
            assert {tensor(made, n).spec.shape for n in (EMBED, HEAD)} == {(target, 8)}
            assert made.model_config["vocab_size"] == target

    def test_a_union_has_the_tokens_of_all(self, models: Path) -> None:
        tokenizer(Path("a"), ["x", "y"])
        tokenizer(Path("b"), ["x", "z", "y"])
        made = plan(tokenizer_source="union")
        assert tensor(made, EMBED).spec.shape == (3, 8)
        assert '"content": "z"' in made.tokenizer_files["tokenizer.json"]
        assert made.tokenizer == Path("a")

    def test_a_model_without_one_numbers_as_the_base_does(self, models: Path) -> None:
        tokenizer(Path("a"), [f"t{i}" for i in range(17)])
        made = plan(tokenizer_source="base")
        assert "b: no tokenizer in it, taken to number its tokens as a does" in made.notes
        assert all(isinstance(s, StoredTensor) for s in tensor(made, EMBED).sources)

    def test_other_shapes_without_one_name_the_remedy(self, models: Path) -> None:
        write(Path("b"), decoder(1, vocab=16))
        with pytest.raises(CheckpointError, match=r"vocabularies differ: add tokenizer_source: base, or union for the"):
            plan()

    def test_rule_sequence_takes_no_other_vocabulary(self, models: Path) -> None:
        for name in ("a", "base"):
            tokenizer(Path(name), [f"t{i}" for i in range(16)])
        with pytest.raises(ConfigError, match=r"^parameters.rule: sequence runs the models as they are"):
            plan(
                merge_method="seme", models=["a"], base_model="base", parameters={"rule": "sequence"},
                tokenizer_source="base",
            )  # fmt: skip


def test_semantic_bases_are_of_no_adapter(models: Path) -> None:
    Path("lora").mkdir()
    (Path("lora") / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2}')
    factors = {f"base_model.model.lm_head.lora_{x}.weight": torch.ones(s) for x, s in (("A", (1, 8)), ("B", (17, 1)))}
    write(Path("lora"), factors, None)
    (Path("lora") / "model.safetensors").rename("lora/adapter_model.safetensors")
    recipe: dict[str, Any] = {"merge_method": "seme", "models": ["a"], "base_model": "base+lora"}
    assert plan(**recipe, parameters={}).models[1].adapter is not None
    with pytest.raises(ConfigError, match=r"^base_model: base\+lora: semantic bases are those of a stored head"):
        plan(**recipe, parameters={"sigma": 0.5})
