"""seme.merge: the folder it leaves is a model that transformers loads, with everything that belongs to it."""

import json
import os
import shutil
import stat

import pytest
import torch
import yaml

import seme
from seme.checkpoint import Writer
from seme.config import load
from seme.dtypes import bfloat16
from seme.errors import BackendError, CheckpointError, ConfigError, LateInterrupt, TargetError
from seme.merging import make_options, merge, ready, with_dtype
from seme.plan import make as make_plan

from . import models as make
from .checkpoints import CONFIG, decoder, read, write


@pytest.fixture
def recipe(tmp_path):
    base = make.llama(tmp_path / "base", shards=2, chat_template=True)
    tuned = make.perturbed(base, tmp_path / "tuned", seed=1)
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": {"weight": 0.5}}],
        "dtype": "float32",
        "out_dtype": "float16",
    }


def test_transformers_loads_it(recipe, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(recipe, tmp_path / "out", out_shard_size="20kB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    original = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer.chat_template == original.chat_template is not None
    logits = model(**tokenizer("a test", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


def test_files_that_belong_to_a_model(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    assert config[key] == "float16"
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert yaml.safe_load((out / "seme_config.yml").read_text()) == recipe
    card = (out / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": [recipe["models"][0]["model"], recipe["base_model"]],
        "library_name": "transformers",
        "tags": ["merge", "seme"],
    }
    for part in ("task_arithmetic", recipe["base_model"], seme.__version__, "weight: 0.5"):
        assert part in text
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) & 0o044, "others may read it, as any new file"


def test_tied_heads_stay_tied(tmp_path):
    from transformers import AutoModelForCausalLM

    base = make.qwen2(tmp_path / "base")
    tuned = make.perturbed(base, tmp_path / "tuned", seed=1)
    merge(
        {"merge_method": "linear", "models": [{"model": str(m)} for m in (base, tuned)], "parameters": {"weight": 1}},
        tmp_path / "out",
    )
    assert "lm_head.weight" not in read(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_tokenizer_source(recipe, tmp_path):
    (tmp_path / "tuned" / "tokenizer_config.json").write_text('{"marker": "tuned"}')
    merge({**recipe, "tokenizer_source": str(tmp_path / "tuned")}, tmp_path / "a")
    merge({**recipe, "tokenizer_source": "base"}, tmp_path / "b")
    assert "marker" in (tmp_path / "a" / "tokenizer_config.json").read_text()
    assert "marker" not in (tmp_path / "b" / "tokenizer_config.json").read_text()


def test_a_model_given_as_its_weight_file(recipe, tmp_path):
    one = make.llama(tmp_path / "one", chat_template=True)
    models = [{"model": str(one / "model.safetensors")}]
    merge({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}, tmp_path / "out")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (one / name).read_bytes()
    assert all(torch.equal(x, read(one)[name]) for name, x in read(tmp_path / "out").items())


def test_a_merge_can_be_merged_again(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    again = {**recipe, "base_model": str(tmp_path / "out"), "models": [{"model": str(tmp_path / "out")}]}
    again["models"][0]["parameters"] = {"weight": 1}
    merge(again, tmp_path / "again")
    assert all(torch.equal(x, read(tmp_path / "out")[name]) for name, x in read(tmp_path / "again").items())


def test_targets_that_are_here_or_behind_a_link(recipe, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").touch()
    (tmp_path / "real" / "config.json").touch()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "empty")
    merge(recipe, ".")
    assert (tmp_path / "empty" / "README.md").read_text().split("---")[2].startswith("\n# empty\n")
    merge(recipe, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()
    assert not (tmp_path / "real" / "old").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"base", "tuned", "empty", "real", "link"}


def test_a_target_that_holds_the_recipe(recipe, tmp_path):
    file = write(tmp_path / "out", decoder(1)) / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe))
    for config in (file, str(file)):
        with pytest.raises(TargetError, match=r"out: holds the recipe .*/out/recipe.yml; choose another"):
            merge(config, tmp_path / "out", overwrite=True)
    merge(file.read_text(), tmp_path / "out", overwrite=True)
    assert not file.exists(), "text is no file, and the folder a model"


def test_an_interrupt_after_the_rename_is_a_late_one(recipe, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    write(tmp_path / "out", decoder(1))
    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(LateInterrupt):
            merge(recipe, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "seme_config.yml").is_file()
    monkeypatch.setattr(Writer, "index", interrupt)
    with pytest.raises(KeyboardInterrupt) as e:
        merge(recipe, tmp_path / "new")
    assert e.type is KeyboardInterrupt
    assert not (tmp_path / "new").exists()


def test_a_backend_that_does_not_work_is_found_before_anything_is_downloaded(recipe, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("seme.plan.resolve", asked.append)
    for options in ({"backend": "fpga"}, {"device": "tpu"}):
        with pytest.raises(BackendError):
            merge({**recipe, "base_model": "hub/model"}, tmp_path / "out", **options)
    assert not asked


@pytest.mark.parametrize("threads", ["2", 1.5, 0, -1])
def test_threads_that_are_no_number_of_threads(threads, recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"^threads: .*; expected a whole number, at least 1$"):
        merge(recipe, tmp_path / "out", threads=threads)


@pytest.mark.parametrize("out", [None, 3])
def test_an_output_that_is_no_path(out, recipe):
    with pytest.raises(ConfigError, match=rf"^out: {out}; expected the path of the new folder$"):
        merge(recipe, out)


def test_a_recipe_with_a_fence_does_not_end_the_model_cards(recipe, tmp_path):
    text = yaml.safe_dump(recipe) + "# ```\n# ````\n"
    merge(text, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.endswith(f"`````yaml\n{text}`````\n")
    assert "\n```yaml\n" in (merge(recipe, tmp_path / "other").path / "README.md").read_text()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "modeling_x.py"])
def test_a_file_that_cannot_be_copied_shows_before_bytes(name, tmp_path, monkeypatch):
    config = {**CONFIG, "auto_map": {"AutoModel": "modeling_x.Model"}}
    file = write(tmp_path / "a", decoder(1), config) / name
    file.write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, _: path != file)
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "a")}], "parameters": {"weight": 1}}
    plan = make_plan(load(recipe))
    with pytest.raises(CheckpointError, match=rf"^{file}: no permission to read it; it belongs to the output"):
        ready(plan, make_options("1GiB", 1, "error"), "auto", "cpu")
    plan.close()


def test_custom_code_is_copied(tmp_path):
    for seed, name in enumerate(("a", "b")):
        write(tmp_path / name, decoder(seed), {**CONFIG, "auto_map": {"AutoModel": "modeling_x.Model"}})
        (tmp_path / name / "modeling_x.py").write_text("class Model: ...\n")
    models = [{"model": str(tmp_path / n)} for n in ("a", "b")]
    merge({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}, tmp_path / "out")
    assert (tmp_path / "out" / "modeling_x.py").is_file()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"architectures": ["X"]}, {"architectures": ["X"], "torch_dtype": "bfloat16"}),
        ({"text_config": {"dtype": "float32", "x": 1}}, {"text_config": {"dtype": "bfloat16", "x": 1}}),
    ],
)
def test_dtype_of_config_json(config, expected):
    assert with_dtype(config, bfloat16) == expected


def test_other_dtypes_that_config_names_are_left_alone():
    config = {"dtype": "float32", "quantization_config": {"bnb_4bit_compute_dtype": "float16"}}
    assert with_dtype(config, bfloat16)["quantization_config"] == {"bnb_4bit_compute_dtype": "float16"}
