"""LoRA adapters against PEFT's merge_and_unload, which mergekit calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import seme
from seme.errors import CheckpointError

from .. import models as make
from ..checkpoints import read
from .compare import ulp
from .oracle import Oracle

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "down_proj"]


def adapter(base: Path, folder: Path, **options: Any) -> tuple[Path, Path]:
    """An adapter with random factors for a model; its folder, and that of the model with it, as PEFT merges them."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **options}, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name or ("base_layer.bias" in name and "bias" in options):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


def merged(reference: Any, out: Path) -> dict[str, torch.Tensor]:
    """A model through seme, as it is."""
    text = {"merge_method": "linear", "models": [{"model": reference, "parameters": {"weight": 1}}]}
    return read(seme.merge(text, out).path)


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> int:
    """Assert that values agree; returns how many tensors the adapter changed.

    PEFT rounds the product to the weight's dtype, then the sum: half an ulp of each; seme rounds the sum once, another
    half ulp. In float32 the products differ by the order of their sums, of at most 5 terms, a few ulps.
    """
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        a, b = tensor.double(), theirs[name].double()
        delta = (b - base[name].double()).abs()
        size = torch.maximum(torch.maximum(a.abs(), b.abs()), delta)
        allowed = ulp(size, tensor.dtype) * (2 if tensor.dtype == torch.bfloat16 else 8)
        assert bool(((a - b).abs() <= allowed).all()), name
    return sum(not torch.equal(theirs[n], base[n]) for n in theirs)


LLAMA = {
    "plain": ({}, 4),
    "rslora": ({"use_rslora": True}, 4),
    "patterns": ({"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.mlp.down_proj": 11}}, 4),
    "replaced-modules": ({"modules_to_save": ["lm_head"]}, 5),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, 3),
    "head": ({"target_modules": ["lm_head"]}, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("options", "changed"), LLAMA.values(), ids=LLAMA)
def test_llama(options: dict[str, Any], changed: int, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make.llama(tmp_path / "base", dtype=dtype)
    lora, theirs = adapter(base, tmp_path, **options)
    ours = merged(f"{base}+{lora}", tmp_path / "out")
    assert compare(ours, read(theirs), read(base)) == changed


def test_qwen2_with_biases_and_ties(tmp_path: Path) -> None:
    base = make.qwen2(tmp_path / "base", dtype=torch.float32)
    lora, theirs = adapter(base, tmp_path, bias="lora_only", target_modules=["q_proj"])
    assert compare(merged({"model": str(base), "lora": str(lora)}, tmp_path / "out"), read(theirs), read(base)) == 4


def test_gpt2_stores_the_transpose(tmp_path: Path) -> None:
    base = make.gpt2(tmp_path / "base")
    # c_proj of attention is square, so that only fan_in_fan_out tells.
    lora, theirs = adapter(base, tmp_path, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    assert compare(merged(f"{base}+{lora}", tmp_path / "out"), read(theirs), read(base)) == 4


def test_an_adapted_model_in_a_merge_is_mergekits(oracle: Oracle, tmp_path: Path) -> None:
    base = make.llama(tmp_path / "base", dtype=torch.float32)
    lora, _ = adapter(base, tmp_path)
    text = (
        f"merge_method: task_arithmetic\nbase_model: {base}\n"
        f"models: [{{model: {{model: {base}, lora: {lora}}}, parameters: {{weight: 0.5}}}}]\ndtype: float32\n"
    )
    out = seme.merge(text, tmp_path / "seme").path
    oracle.merge(text, tmp_path / "mergekit", copy_tokenizer=False, lora_merge_cache=str(tmp_path / "cache"))
    assert compare(read(out), read(tmp_path / "mergekit"), read(base)) == 4


def test_the_bytes_do_not_depend_on_chunks_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make.llama(tmp_path / "base", hidden=128, vocab=300)
    lora, _ = adapter(base, tmp_path, target_modules=["embed_tokens", "down_proj", "up_proj"])
    text = {"merge_method": "linear", "models": [{"model": f"{base}+{lora}", "parameters": {"weight": 1}}]}
    whole = seme.merge(text, tmp_path / "whole", threads=1).path
    monkeypatch.setattr("seme.engine.CHUNK_BYTES", 1 << 16)
    parts = seme.merge(text, tmp_path / "parts", threads=3).path
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


Edit = Callable[[dict[str, Any]], None]
REFUSED: dict[str, tuple[Edit, str]] = {
    "dora": (lambda c: c.update(use_dora=True), "use_dora: DoRA rescales whole columns"),
    "other-kind": (lambda c: c.update(peft_type="IA3"), "peft_type 'IA3'; expected LORA"),
    "pissa": (
        lambda c: c.update(init_lora_weights="pissa_niter_4"),
        "init_lora_weights pissa_niter_4: it is for a",
    ),
    "alpha": (lambda c: c.update(lora_alpha="x"), "lora_alpha 'x' of "),
}


@pytest.mark.parametrize(("edit", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_lora_is_refused(edit: Edit, message: str, tmp_path: Path) -> None:
    base = make.llama(tmp_path / "base")
    lora, _ = adapter(base, tmp_path)
    file = lora / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    edit(config)
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"^{file}: {message}"):
        merged(f"{base}+{lora}", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    lora, _ = adapter(make.llama(tmp_path / "base"), tmp_path)
    wide, few = make.llama(tmp_path / "wide", hidden=64), make.llama(tmp_path / "few", layers=1)
    with pytest.raises(CheckpointError, match=r"do not fit .*; take the model that the adapter was trained on"):
        merged(f"{wide}+{lora}", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"layers.1.* is adapted, and the model has none such"):
        merged(f"{few}+{lora}", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no adapter_config.json in it; name the folder of a LoRA adapter"):
        merged(f"{few}+{wide}", tmp_path / "out")
