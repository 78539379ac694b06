"""Slices and modules against mergekit 0.1.5: the same layers under the same names, the same parameters for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from string import Template

import pytest
import torch

import seme
from seme.errors import ConfigError
from seme.sections import before

from ..checkpoints import read, write
from .compare import Distance
from .oracle import Oracle, OracleError
from .test_mergekit import check, run_both

Models = Callable[[str, str, str], Path]
Record = Callable[[str, str, Distance], None]

SLICES = {
    "stack": """
merge_method: linear
slices:
  - {sources: [{model: $a, layer_range: [0, 2], parameters: {weight: 1}}]}
  - {sources: [{model: $b, layer_range: [1, 3], parameters: {weight: 1}}]}
  - {sources: [{model: $a, layer_range: [0, 3], parameters: {weight: 1}}]}
""",
    "average-of-shifted-layers": """
merge_method: linear
slices:
  - sources:
      - {model: $a, layer_range: [0, 2], parameters: {weight: 0.3}}
      - {model: $b, layer_range: [1, 3], parameters: {weight: [0.2, 0.7]}}
  - sources: [{model: $c, layer_range: [2, 3]}, {model: $a, layer_range: [0, 1], parameters: {weight: 0.9}}]
    parameters: {weight: 0.4}
parameters: {weight: 0.1}
""",
    "slerp": """
merge_method: slerp
base_model: $base
slices:
  - sources: [{model: $base, layer_range: [0, 3]}, {model: $c, layer_range: [0, 3]}]
parameters:
  t:
    - {filter: $attention, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: $mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
""",
    "a-base-of-its-own": """
merge_method: task_arithmetic
base_model: $base
slices:
  - sources: [{model: $base, layer_range: [0, 1]}, {model: $a, layer_range: [0, 1], parameters: {weight: 0.3}}]
    parameters: {lambda: 0.5}
  - sources: [{model: $b, layer_range: [1, 3], parameters: {weight: 0.6}}, {model: $c, layer_range: [1, 3]}]
    base_model: $c
    parameters: {lambda: [0.7, 1.2]}
""",
    # Filters see the output's names for shared parameters, the input's for those of one input.
    "filters-by-layer": """
merge_method: task_arithmetic
base_model: $base
slices:
  - sources: [{model: $base, layer_range: [1, 3]}, {model: $a, layer_range: [1, 3], parameters: {weight: $conditions}}]
  - sources: [{model: $base, layer_range: [0, 2]}, {model: $a, layer_range: [0, 2], parameters: {weight: $conditions}}]
parameters: {lambda: $conditions}
""",
}
CONDITIONS = "[{filter: $second, value: 0.25}, {value: 0.75}]"


def text_of(recipe: str, family: str, words: Mapping[str, str], model: Models) -> str:
    filled = recipe.replace("$conditions", CONDITIONS)
    members = {m: str(model(family, m, "bfloat16")) for m in ("base", "a", "b", "c") if f"${m}" in filled}
    return Template(filled).substitute(words, **members) + "dtype: float32\nout_dtype: bfloat16\n"


WORDS = {
    "llama": {"attention": "self_attn", "mlp": "mlp", "second": "layers.1."},
    "qwen2": {"attention": "self_attn", "mlp": "mlp", "second": "layers.1."},
    "gpt2": {"attention": "attn", "mlp": "mlp", "second": "h.1."},
}


@pytest.mark.parametrize("family", WORDS)
@pytest.mark.parametrize("recipe", SLICES.values(), ids=SLICES)
def test_slices(recipe: str, family: str, model: Models, oracle: Oracle, record: Record, tmp_path: Path) -> None:
    text = text_of(recipe, family, WORDS[family], model)
    ours, theirs = tmp_path / "seme", tmp_path / "mergekit"
    # mergekit leaves Qwen2's layer_types as they are, which transformers then refuses; the tensors are written by then.
    refused = family == "qwen2" and recipe in (SLICES["stack"], SLICES["filters-by-layer"])
    said = pytest.raises(OracleError, match="layer_types") if refused else nullcontext()
    with said, oracle.merging(text, theirs, copy_tokenizer=False):
        seme.merge(text, ours)
    check(text, ours, theirs, oracle, record, "float32, bfloat16")
    stacks = {int(p) for n in read(ours) for p in n.split(".") if p.isdigit()}
    for folder in (ours,) if refused else (ours, theirs):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["n_layer" if family == "gpt2" else "num_hidden_layers"] == len(stacks)


REFUSED = {
    "unequal": """
merge_method: linear
slices: [{sources: [{model: $a, layer_range: [0, 2]}, {model: $b, layer_range: [0, 1]}]}]
parameters: {weight: 1}
""",
    "beyond": """
merge_method: linear
slices: [{sources: [{model: $a, layer_range: [0, 9]}]}]
parameters: {weight: 1}
""",
    "base-not-there": """
merge_method: task_arithmetic
base_model: $base
slices: [{sources: [{model: $a, layer_range: [0, 2]}]}]
parameters: {weight: 1}
""",
    "twice": """
merge_method: linear
slices: [{sources: [{model: $a, layer_range: [0, 2]}, {model: $a, layer_range: [1, 3]}]}]
parameters: {weight: 1}
""",
    "two-forms": """
merge_method: linear
models: [{model: $a}]
slices: [{sources: [{model: $a, layer_range: [0, 2]}]}]
parameters: {weight: 1}
""",
}


@pytest.mark.parametrize("recipe", REFUSED.values(), ids=REFUSED)
def test_what_mergekit_refuses_seme_refuses(recipe: str, model: Models, oracle: Oracle, tmp_path: Path) -> None:
    text = text_of(recipe, "qwen2", WORDS["qwen2"], model)
    with pytest.raises(OracleError):
        oracle.merge(text, tmp_path / "mergekit", copy_tokenizer=False)
    with pytest.raises(ConfigError):
        seme.merge(text, tmp_path / "seme")
    assert not (tmp_path / "seme").exists()


# Checkpoints of several modules.

TEXT = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 17,
    "model_type": "mistral",
}
VISION = {
    "hidden_size": 6,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 3,
    "patch_size": 2,
    "image_size": 8,
    "num_channels": 3,
    "model_type": "pixtral",
}
MISTRAL3 = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": TEXT,
    "vision_config": VISION,
    "spatial_merge_size": 2,
    "dtype": "float32",
}


def mistral3(folder: Path, seed: int) -> Path:
    """A vision-language model as Mistral Small 3.1 stores it."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"language_model.model.embed_tokens.weight": (17, 8)}
    for i in range(3):
        layer = f"language_model.model.layers.{i}."
        for name, shape in (("q", (8, 8)), ("k", (4, 8)), ("v", (4, 8)), ("o", (8, 8))):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = shape
        for name, shape in (("gate", (12, 8)), ("up", (12, 8)), ("down", (8, 12))):
            shapes[f"{layer}mlp.{name}_proj.weight"] = shape
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (8,)
    shapes["language_model.model.norm.weight"] = (8,)
    shapes["language_model.lm_head.weight"] = (17, 8)
    shapes["vision_tower.patch_conv.weight"] = (6, 3, 2, 2)
    shapes["vision_tower.ln_pre.weight"] = (6,)
    for i in range(2):
        layer = f"vision_tower.transformer.layers.{i}."
        for name in "qkvo":
            shapes[f"{layer}attention.{name}_proj.weight"] = (6, 6)
        for name, shape in (("gate", (10, 6)), ("up", (10, 6)), ("down", (6, 10))):
            shapes[f"{layer}feed_forward.{name}_proj.weight"] = shape
        shapes[f"{layer}attention_norm.weight"] = shapes[f"{layer}ffn_norm.weight"] = (6,)
    shapes["multi_modal_projector.norm.weight"] = (6,)
    shapes["multi_modal_projector.patch_merger.merging_layer.weight"] = (6, 24)
    shapes["multi_modal_projector.linear_1.weight"] = (8, 6)
    shapes["multi_modal_projector.linear_2.weight"] = (8, 8)
    return write(folder, {n: torch.randn(s, generator=generator) for n, s in shapes.items()}, MISTRAL3)


def t5(folder: Path, seed: int) -> Path:
    """An encoder-decoder with one embedding for both."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (17, 8), "lm_head.weight": (17, 8)}
    for side, layers in (("encoder", 2), ("decoder", 3)):
        for i in range(layers):
            parts = ("SelfAttention",) if side == "encoder" else ("SelfAttention", "EncDecAttention")
            for j, part in enumerate(parts):
                for name in "qkvo":
                    shapes[f"{side}.block.{i}.layer.{j}.{part}.{name}.weight"] = (8, 8)
                shapes[f"{side}.block.{i}.layer.{j}.layer_norm.weight"] = (8,)
            last = f"{side}.block.{i}.layer.{len(parts)}."
            shapes[f"{last}layer_norm.weight"] = (8,)
            shapes |= {f"{last}DenseReluDense.{n}.weight": (12, 8) for n in ("wi_0", "wi_1")}
            shapes[f"{last}DenseReluDense.wo.weight"] = (8, 12)
        shapes[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (4, 2)
        shapes[f"{side}.final_layer_norm.weight"] = (8,)
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_heads": 2,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "relative_attention_num_buckets": 4,
        "vocab_size": 17,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    return write(folder, {n: torch.randn(s, generator=generator) for n, s in shapes.items()}, config)


def equal(ours: Path, theirs: Path) -> dict[str, torch.Tensor]:
    """The merged tensors, which both tools made with the same values. (Linear sums of at most two float32 terms on
    torch's plain kernels, which round as seme does.)"""
    mine, other = read(ours), read(theirs)
    assert set(mine) == set(other)
    for name in mine:
        assert torch.equal(mine[name], other[name]), name
    return mine


MODULES = """
merge_method: linear
modules:
  text_decoder:
    slices:
      - sources: [{model: $a, layer_range: [0, 2]}, {model: $b, layer_range: [1, 3], parameters: {weight: 0.8}}]
        parameters: {weight: 0.3}
      - sources: [{model: $b, layer_range: [0, 3]}]
    parameters: {weight: 0.6, normalize: false}
  vision_tower:
    models: [{model: $a, parameters: {weight: [0.1, 0.9]}}, {model: $b}]
  multi_modal_projector:
    models: [{model: $b}]
parameters: {weight: 0.5}
"""


def test_modules_of_a_vision_language_model(oracle: Oracle, tmp_path: Path) -> None:
    a, b = mistral3(tmp_path / "a", 1), mistral3(tmp_path / "b", 2)
    text = Template(MODULES).substitute(a=a, b=b)
    ours, theirs = run_both(text, oracle, tmp_path)
    merged = equal(ours, theirs)
    assert "language_model.model.layers.4.mlp.up_proj.weight" in merged
    mine, other = (json.loads((f / "config.json").read_text(encoding="utf-8")) for f in (ours, theirs))
    for part, count in (("text_config", 5), ("vision_config", 2)):
        assert mine[part]["num_hidden_layers"] == other[part]["num_hidden_layers"] == count


def test_models_of_a_vision_language_model_need_no_modules(oracle: Oracle, tmp_path: Path) -> None:
    a, b = mistral3(tmp_path / "a", 1), mistral3(tmp_path / "b", 2)
    text = (
        f"merge_method: linear\nmodels: [{{model: {a}, parameters: {{weight: [0.1, 0.9, 0.3]}}}}, {{model: {b}}}]\n"
        "parameters: {weight: 0.5}\n"
    )
    equal(*run_both(text, oracle, tmp_path))


def test_default_is_everything(model: Models, oracle: Oracle, tmp_path: Path) -> None:
    """Of a model whose architecture mergekit infers, whatever modules it has. (mergekit leaves all layers out.)"""
    a, b = (model("llava", m, "float32") for m in ("a", "b"))
    text = f"merge_method: linear\nmodules: {{default: {{models: [{{model: {a}}}, {{model: {b}}}]}}}}\n"
    mine, other = map(read, run_both(text + "parameters: {weight: 0.5}\n", oracle, tmp_path))
    assert set(mine) == set(read(a))
    assert 0 < len(other) < len(mine)
    for name in other:
        assert torch.equal(mine[name], other[name]), name


def test_slices_of_a_vision_language_model_need_modules(oracle: Oracle, tmp_path: Path) -> None:
    a = mistral3(tmp_path / "a", 1)
    text = (
        f"merge_method: linear\nslices: [{{sources: [{{model: {a}, layer_range: [0, 2]}}]}}]\n"
        "parameters: {weight: 1}\n"
    )
    with pytest.raises(OracleError, match="must use modules"):
        oracle.merge(text, tmp_path / "mergekit", copy_tokenizer=False)
    with pytest.raises(ConfigError, match=r"^slices: the model has several stacks of layers: .*; write modules"):
        seme.merge(text, tmp_path / "seme")


def test_modules_of_an_encoder_decoder(oracle: Oracle, tmp_path: Path) -> None:
    a, b = t5(tmp_path / "a", 1), t5(tmp_path / "b", 2)
    text = Template(
        "merge_method: linear\nparameters: {weight: 0.5}\nmodules:\n"
        "  shared: {models: [{model: $a}, {model: $b, parameters: {weight: 0.2}}]}\n"
        "  encoder: {slices: [{sources: [{model: $a, layer_range: [0, 2]}]}]}\n"
        "  decoder:\n    slices:\n"
        "      - {sources: [{model: $b, layer_range: [0, 2]}, {model: $a, layer_range: [0, 2]}]}\n"
        # Were it the other way round, mergekit would take the final norm from one of the two.
        "      - {sources: [{model: $a, layer_range: [1, 3]}]}\n"
    ).substitute(a=a, b=b)
    ours, theirs = run_both(text, oracle, tmp_path)
    mine, other = read(ours), read(theirs)
    # mergekit lists the embeddings of both sides as copies of the shared one, where the checkpoints have none.
    assert set(other) - set(mine) <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert set(mine) <= set(other)
    for name in mine:
        assert torch.equal(mine[name], other[name]), name
    for folder in (ours, theirs):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert (config["num_layers"], config["num_decoder_layers"]) == (2, 4)


def test_recipes_that_use_each_others_results(model: Models, oracle: Oracle, tmp_path: Path) -> None:
    """mergekit-multi runs mergekit once per document, with the folder of a result in the place of its name."""
    base, a, b = (model("qwen2", m, "bfloat16") for m in ("base", "a", "b"))
    first = (
        f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]\nparameters: {{weight: 1}}\ndtype: float32\n"
    )
    second = (
        f"merge_method: task_arithmetic\nbase_model: {base}\ndtype: float32\nout_dtype: bfloat16\n"
        "models: [{model: $mean, parameters: {weight: 0.5}}]\n"
    )
    text = f"name: mean\n{first}---\n{Template(second).substitute(mean='mean')}"
    ours = seme.merge(text, tmp_path / "seme").path
    mean = oracle.merge(first, tmp_path / "mean", copy_tokenizer=False)
    equal(ours, oracle.merge(Template(second).substitute(mean=mean), tmp_path / "mergekit", copy_tokenizer=False))


def test_what_comes_before_the_layers_is_what_mergekit_lists_before_them() -> None:
    """The end slices take other tensors of other models, so the line between them must be mergekit's."""
    listed = 0
    folder = Path(str(find_spec("mergekit._data.architectures").origin)).parent  # type: ignore[union-attr]
    for file in sorted(folder.glob("*.json")):
        whole = json.loads(file.read_text(encoding="utf-8"))
        for name, module in (whole.get("modules") or {"": {"architecture": whole}}).items():
            what = module["architecture"]
            # A projector's list of linear maps is no stack of layers.
            if (
                isinstance(what, str)
                or not (what.get("layer_templates") or {}).get("weights")
                or name == "multi_modal_projector"
            ):
                continue
            for weights, expected in ((what["pre_weights"], True), (what["post_weights"], False)):
                for weight in weights:
                    tensor = (module.get("weight_prefix") or "") + weight["name"]
                    assert before(tensor) is expected, (file.name, tensor)
                    listed += 1
    assert listed > 200
