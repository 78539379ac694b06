"""seme/checkpoint/chat.py: chat templates by name, of a model, and where they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import seme
from seme.checkpoint.chat import TEMPLATES, choose, template_of
from seme.errors import CheckpointError

from ..checkpoints import decoder, tokenizer, write

TURNS = [("system", "S"), ("user", " U"), ("assistant", "A "), ("user", "V")]
RENDERED = {
    "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\nA\n\n### Instruction:\nV\n\n### Response:\n",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n U<|im_end|>\n<|im_start|>assistant\nA <|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]S[|endofturn|]\n[|user|] U\n[|assistant|]A [|endofturn|]\n[|user|]V\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "U<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] S\n\n U [/INST] A </s> [INST] V [/INST]",
}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    found = []
    for seed, name in enumerate(("a", "b", "c")):
        folder = tokenizer(write(tmp_path / name, decoder(seed)), [f"t{i}" for i in range(17)])
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        found.append(folder)
    return found


def merge(models: list[Path], out: Path, **keys: Any) -> Path:
    entries = [{"model": str(m), "parameters": {"weight": 1}} for m in models]
    return seme.merge({"merge_method": "linear", "models": entries, **keys}, out).path


def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_by_name(name: str, models: list[Path], tmp_path: Path) -> None:
    found = loaded(merge(models, tmp_path / "out", chat_template=name))
    turns = [{"role": role, "content": content} for role, content in TURNS]
    assert found.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == RENDERED[name]


def test_a_template_of_ones_own_replaces_the_models(models: list[Path], tmp_path: Path) -> None:
    settings = json.loads((models[0] / "tokenizer_config.json").read_text())
    (models[0] / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ old }}"}))
    (models[0] / "chat_template.json").write_text("{}")
    own = "{% for m in messages %}{{ m.content }}{% endfor %}"
    out = merge(models, tmp_path / "out", chat_template=own, tokenizer_source="union")
    assert loaded(out).chat_template == own
    assert json.loads((out / "tokenizer_config.json").read_text()) == settings
    assert not (out / "chat_template.json").exists()


def test_auto_is_that_of_most_models(models: list[Path], tmp_path: Path) -> None:
    (models[0] / "chat_template.jinja").write_text("{{ a }}")
    for model, said in zip(models[1:], ("{{ b }} ", [{"name": "default", "template": "{{ b }}"}])):
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": said}))
    assert [template_of(m) for m in models] == ["{{ a }}", "{{ b }}", "{{ b }}"]
    assert loaded(merge(models, tmp_path / "out", chat_template="auto")).chat_template == "{{ b }}"
    assert choose("auto", models[:2]) == "{{ a }}"  # the first of as many
    assert choose("auto", [tmp_path]) is None


def test_without_a_tokenizer_it_is_an_error(models: list[Path], tmp_path: Path) -> None:
    (models[0] / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"a: no tokenizer in it that a chat_template could be of"):
        merge(models, tmp_path / "out", chat_template="chatml")
