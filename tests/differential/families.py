"""Small models of several architectures, written tensor by tensor.

Names, shapes and configs are those that transformers gives these architectures. Sizes are odd where the architecture
allows it. No model is ever instantiated, so no transformers is imported. Every family has a base model and three
fine-tunes that differ in kind:

- ``a``: every element moved a little (a tenth of the weights' spread);
- ``b``: 30 % of the elements moved, the others equal the base's, and the whole first MLP tensor unchanged;
- ``c``: every element moved as far as the weights are spread, so that the angle to the base is 45 degrees.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import tokenizer, write

Shapes = dict[str, tuple[int, ...]]
MEMBERS = ("base", "a", "b", "c")
SPREAD = 0.02


def _decoder(config: Mapping[str, Any], *, biases: bool, head: bool) -> Shapes:
    """llama, mistral and qwen2."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    narrow = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows in (("q", hidden), ("k", narrow), ("v", narrow)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, hidden)
            if biases:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if head:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _gemma2(config: Mapping[str, Any]) -> Shapes:
    """A tied decoder with norms before and after each block."""
    shapes = _decoder(config, biases=False, head=False)
    for i in range(config["num_hidden_layers"]):
        for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (config["hidden_size"],)
    return shapes


def _phi3(config: Mapping[str, Any]) -> Shapes:
    """Queries, keys and values in one matrix, gate and up in another."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    narrow = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes[f"{layer}self_attn.qkv_proj.weight"] = (hidden + 2 * narrow, hidden)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _mixtral(config: Mapping[str, Any]) -> Shapes:
    """A mixture of experts as transformers 5 holds it and mergekit 0.1.5 lists it: all experts in one 3-D tensor."""
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    shapes = {k: v for k, v in _decoder(config, biases=False, head=True).items() if ".mlp." not in k}
    for i in range(config["num_hidden_layers"]):
        shapes[f"model.layers.{i}.mlp.gate.weight"] = (experts, hidden)
        shapes[f"model.layers.{i}.mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
        shapes[f"model.layers.{i}.mlp.experts.down_proj"] = (experts, hidden, inner)
    return shapes


def _llava(config: Mapping[str, Any]) -> Shapes:
    """CLIP's vision tower, a projector and llama, by transformers 5's names. mergekit 0.1.5 has no list for it: it
    infers one from these names, with transformers' help."""
    text, vision = config["text_config"], config["vision_config"]
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    tower = "model.vision_tower."
    shapes: Shapes = {
        f"{tower}embeddings.class_embedding": (hidden,),
        f"{tower}embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        f"{tower}embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2 + 1, hidden),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes[f"{tower}{name}.weight"] = shapes[f"{tower}{name}.bias"] = (hidden,)
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden, hidden),
            ("self_attn.v_proj", hidden, hidden),
            ("self_attn.out_proj", hidden, hidden),
            ("mlp.fc1", inner, hidden),
            ("mlp.fc2", hidden, inner),
        ):
            shapes[f"{layer}{name}.weight"] = (rows, columns)
            shapes[f"{layer}{name}.bias"] = (rows,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (hidden,)
    width = text["hidden_size"]
    for name, columns in (("linear_1", hidden), ("linear_2", width)):
        shapes[f"model.multi_modal_projector.{name}.weight"] = (width, columns)
        shapes[f"model.multi_modal_projector.{name}.bias"] = (width,)
    for name, shape in _decoder(text, biases=False, head=True).items():
        shapes[name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)] = shape
    return shapes


def _gpt2(config: Mapping[str, Any]) -> Shapes:
    hidden = config["n_embd"]
    shapes: Shapes = {
        "transformer.wte.weight": (config["vocab_size"], hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
    }
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}."
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, config["n_inner"]),
            ("mlp.c_proj", config["n_inner"], hidden),
        ):
            shapes[f"{layer}{name}.weight"] = (rows, columns)
            shapes[f"{layer}{name}.bias"] = (columns,)
        for name in ("ln_1", "ln_2"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (hidden,)
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (hidden,)
    return shapes


def _bert(config: Mapping[str, Any]) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "bert.embeddings.position_ids": (1, config["max_position_embeddings"]),
        "bert.embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "bert.embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "bert.embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
        "bert.embeddings.LayerNorm.weight": (hidden,),
        "bert.embeddings.LayerNorm.bias": (hidden,),
        "bert.pooler.dense.weight": (hidden, hidden),
        "bert.pooler.dense.bias": (hidden,),
        "classifier.weight": (2, hidden),
        "classifier.bias": (2,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"bert.encoder.layer.{i}."
        for name, rows, columns in (
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", inner, hidden),
            ("output.dense", hidden, inner),
        ):
            shapes[f"{layer}{name}.weight"] = (rows, columns)
            shapes[f"{layer}{name}.bias"] = (rows,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (hidden,)
    return shapes


@dataclass(frozen=True)
class Family:
    """An architecture at one size.

    Attributes:
        config: config.json, without a dtype.
        shapes: tensors from the config.
        words: what recipes call the parts of this architecture: ``$attention``, ``$mlp``, ``$second`` (layer 2).
    """

    config: Mapping[str, Any]
    shapes: Callable[[Mapping[str, Any]], Shapes]
    words: Mapping[str, str]


_LLAMA_WORDS = {"attention": "self_attn", "mlp": "mlp", "second": "layers.1."}
_SMALL = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

FAMILIES = {
    "llama": Family(
        {**_SMALL, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4},
        lambda c: _decoder(c, biases=False, head=True),
        _LLAMA_WORDS,
    ),
    "mistral": Family(  # a single layer: the end of every gradient
        {**_SMALL, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_hidden_layers": 1},
        lambda c: _decoder(c, biases=False, head=True),
        _LLAMA_WORDS,
    ),
    "qwen2": Family(
        {
            **_SMALL,
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
        },
        lambda c: _decoder(c, biases=True, head=False),
        _LLAMA_WORDS,
    ),
    "gpt2": Family(
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_embd": 24,
            "n_inner": 37,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 19,
            "vocab_size": 61,
        },
        _gpt2,
        {"attention": "attn", "mlp": "mlp", "second": "h.1."},
    ),
    # As older checkpoints are, with the int64 buffer. (mergekit 0.1.5 cannot read a bare BertModel.)
    "bert": Family(
        {
            "architectures": ["BertForSequenceClassification"],
            "model_type": "bert",
            "hidden_size": 24,
            "intermediate_size": 37,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": 61,
            "max_position_embeddings": 19,
            "type_vocab_size": 2,
        },
        _bert,
        {"attention": "attention", "mlp": "intermediate", "second": "layer.1."},
    ),
    "gemma2": Family(
        {
            **_SMALL,
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "num_hidden_layers": 2,
            "head_dim": 6,
            "tie_word_embeddings": True,
        },
        _gemma2,
        _LLAMA_WORDS,
    ),
    "phi3": Family(
        {
            **_SMALL,
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "num_hidden_layers": 3,
            "pad_token_id": 0,
        },
        _phi3,
        _LLAMA_WORDS,
    ),
    "mixtral": Family(
        {
            **_SMALL,
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_hidden_layers": 2,
            "intermediate_size": 13,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
        _mixtral,
        _LLAMA_WORDS,
    ),
    # Two stacks of layers of different length, each with gradients of its own.
    "llava": Family(
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": 60,
            "vocab_size": 61,
            "tie_word_embeddings": False,
            "text_config": {**_SMALL, "model_type": "llama", "num_hidden_layers": 3},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 12,
                "intermediate_size": 17,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "projection_dim": 12,
            },
        },
        _llava,
        _LLAMA_WORDS,
    ),
    # An embedding of more than 2^20 elements: several chunks, and a sample before the TIES histogram.
    "wide": Family(
        {
            **_SMALL,
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": 32,
            "vocab_size": 33001,
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
        },
        lambda c: _decoder(c, biases=True, head=False),
        _LLAMA_WORDS,
    ),
}


def _values(family: str, member: str) -> dict[str, torch.Tensor]:
    """float32 values of a model; position_ids in int64, the same in every member."""
    generator = torch.Generator().manual_seed(zlib.crc32(family.encode()))
    moves = torch.Generator().manual_seed(zlib.crc32(f"{family} {member}".encode()))
    words = FAMILIES[family].words
    untouched = None
    values = {}
    for name, shape in FAMILIES[family].shapes(FAMILIES[family].config).items():
        if name.endswith("position_ids"):
            values[name] = torch.arange(shape[-1]).reshape(shape)
            continue
        x = SPREAD * torch.randn(shape, generator=generator)
        if name.endswith(".bias"):
            x.zero_()  # as a model begins
        elif len(shape) == 1:
            x += 1  # the weight of a norm
        move = SPREAD * torch.randn(shape, generator=moves)
        if member == "a":
            x += 0.1 * move
        elif member == "b":
            chosen = torch.rand(shape, generator=moves) < 0.3
            if untouched is None and words["mlp"] in name:
                untouched = name
            if name != untouched:
                x += 0.3 * move * chosen
        elif member == "c":
            x += move
        values[name] = x
    return values


def make(folder: Path, family: str, member: str, dtype: str) -> Path:
    """One model of a family, stored in ``dtype``; member ``b`` in shards. All of a family have one vocabulary; its chat
    template and generation config tell whose files they are."""
    kind = getattr(torch, dtype)
    tensors = {k: v.to(kind) if v.is_floating_point() else v for k, v in _values(family, member).items()}
    config = FAMILIES[family].config
    write(folder, tensors, {**config, "dtype": dtype}, layout="shards" if member == "b" else "single")
    tokenizer(folder, [f"t{i}" for i in range(config["vocab_size"])])
    (folder / "chat_template.jinja").write_text(f"{family} {member}")
    (folder / "generation_config.json").write_text(json.dumps({"_from": f"{family} {member}"}))
    return folder
