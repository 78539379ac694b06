"""Checkpoints for tests: dictionaries of small tensors and the folders they are stored in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 17,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def decoder(
    seed: int, dtype: torch.dtype = torch.float32, head: bool = True, layers: int = 3, vocab: int = 17
) -> Tensors:
    """The tensors of a llama of :data:`CONFIG`. Values are multiples of 2^-6 below 2 in magnitude: exact in every
    dtype, and so are their differences, so that ties are many and sums are easily checked."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return (torch.randint(-127, 128, shape, generator=generator) / 64).to(dtype)

    tensors = {"model.embed_tokens.weight": values(vocab, 8)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name, shape in (
            ("self_attn.q_proj", (8, 8)),
            ("self_attn.k_proj", (4, 8)),
            ("self_attn.v_proj", (4, 8)),
            ("self_attn.o_proj", (8, 8)),
            ("mlp.gate_proj", (12, 8)),
            ("mlp.up_proj", (12, 8)),
            ("mlp.down_proj", (8, 12)),
            ("input_layernorm", (8,)),
            ("post_attention_layernorm", (8,)),
        ):
            tensors[f"{layer}{name}.weight"] = values(*shape)
    tensors["model.norm.weight"] = values(8)
    if head:
        tensors["lm_head.weight"] = values(vocab, 8)
    return tensors


def write(folder: Path, tensors: Mapping[str, torch.Tensor], config: Any = CONFIG, layout: str = "single") -> Path:
    """A model folder.

    Args:
        folder: made if need be.
        tensors: by name.
        config: config.json; None writes none.
        layout: ``single``, ``shards`` (three, with an index), ``30 shards``, ``bin`` or ``bin shards``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("pytorch_model", "bin") if layout.startswith("bin") else ("model", "safetensors")
    parts = [dict(tensors)]
    if layout.endswith("shards"):
        count = int(layout.partition(" ")[0]) if layout[0].isdigit() else 3
        parts = [dict(list(tensors.items())[i::count]) for i in range(count)]
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"{stem}.{suffix}" if len(parts) == 1 else f"{stem}-{i + 1:05d}-of-{len(parts):05d}.{suffix}"
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file({k: v.contiguous() for k, v in part.items()}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if len(parts) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> Tensors:
    """All tensors of a safetensors folder, as the format's own library reads them."""
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def tokenizer(folder: Path, words: list[str]) -> Path:
    """A word-level tokenizer that transformers loads; word i has id i."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate(words)}
    whole = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": words[0]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": words[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "special_tokens_map.json").write_text(json.dumps({"unk_token": words[0]}))
    return folder
