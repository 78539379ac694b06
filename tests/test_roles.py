"""Roles of the tensors of tiny models that transformers makes, against tables written by hand."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from seme.errors import CheckpointError, ConfigError
from seme.roles import Latent, Override, Role, TensorRole, hidden_size, latent, layer, layers, parse, roles

Shapes = dict[str, tuple[int, ...]]

# Every name of a family with a layer's index as N and an expert's as E, and what TensorRole prints for it, without
# "(name)". A row holds for the models that have the tensor; all tensors of a model must have a row. Later rows hold
# before earlier ones.
LLAMA = """
model.embed_tokens.weight                          vocabulary
model.layers.N.self_attn.q_proj.weight             reads
model.layers.N.self_attn.k_proj.weight             reads
model.layers.N.self_attn.v_proj.weight             reads
model.layers.N.self_attn.o_proj.weight             writes
model.layers.N.mlp.gate_proj.weight                reads
model.layers.N.mlp.up_proj.weight                  reads
model.layers.N.mlp.down_proj.weight                writes
model.layers.N.input_layernorm.weight              norm
model.layers.N.post_attention_layernorm.weight     norm
model.norm.weight                                  norm
lm_head.weight                                     head
"""
QWEN2 = (
    LLAMA
    + """
model.layers.N.self_attn.q_proj.bias               bias
model.layers.N.self_attn.k_proj.bias               bias
model.layers.N.self_attn.v_proj.bias               bias
"""
)
QWEN3 = (
    LLAMA
    + """
model.layers.N.self_attn.q_norm.weight             norm
model.layers.N.self_attn.k_norm.weight             norm
"""
)
NEMOTRON = (
    LLAMA
    + """
model.layers.N.input_layernorm.bias                bias
model.layers.N.post_attention_layernorm.bias       bias
model.norm.bias                                    bias
"""
)
GEMMA3 = (
    QWEN3
    + """
model.layers.N.pre_feedforward_layernorm.weight    norm
model.layers.N.post_feedforward_layernorm.weight   norm
"""
)
GEMMA3_VISION = (
    GEMMA3.replace("model.", "model.language_model.")
    + """
model.vision_tower.embeddings.patch_embedding.weight                    other
model.vision_tower.embeddings.patch_embedding.bias                      bias
model.vision_tower.embeddings.position_embedding.weight                 other
model.vision_tower.encoder.layers.N.self_attn.q_proj.weight             other
model.vision_tower.encoder.layers.N.self_attn.k_proj.weight             other
model.vision_tower.encoder.layers.N.self_attn.v_proj.weight             other
model.vision_tower.encoder.layers.N.self_attn.out_proj.weight           other
model.vision_tower.encoder.layers.N.mlp.fc1.weight                      other
model.vision_tower.encoder.layers.N.mlp.fc2.weight                      other
model.vision_tower.encoder.layers.N.self_attn.q_proj.bias               bias
model.vision_tower.encoder.layers.N.self_attn.k_proj.bias               bias
model.vision_tower.encoder.layers.N.self_attn.v_proj.bias               bias
model.vision_tower.encoder.layers.N.self_attn.out_proj.bias             bias
model.vision_tower.encoder.layers.N.mlp.fc1.bias                        bias
model.vision_tower.encoder.layers.N.mlp.fc2.bias                        bias
model.vision_tower.encoder.layers.N.layer_norm1.weight                  norm
model.vision_tower.encoder.layers.N.layer_norm1.bias                    bias
model.vision_tower.encoder.layers.N.layer_norm2.weight                  norm
model.vision_tower.encoder.layers.N.layer_norm2.bias                    bias
model.vision_tower.post_layernorm.weight                                norm
model.vision_tower.post_layernorm.bias                                  bias
model.multi_modal_projector.mm_input_projection_weight                  writes, transposed
model.multi_modal_projector.mm_soft_emb_norm.weight                     norm
"""
)
PHI3 = (
    LLAMA
    + """
model.layers.N.self_attn.qkv_proj.weight           reads
model.layers.N.mlp.gate_up_proj.weight             reads
"""
)
MIXTRAL = (
    LLAMA
    + """
model.layers.N.mlp.gate.weight                     reads
model.layers.N.mlp.experts.gate_up_proj            reads, stacked
model.layers.N.mlp.experts.down_proj               writes, stacked
"""
)
MIXTRAL_FILES = (
    LLAMA
    + """
model.layers.N.block_sparse_moe.gate.weight            reads
model.layers.N.block_sparse_moe.experts.E.w1.weight    reads
model.layers.N.block_sparse_moe.experts.E.w3.weight    reads
model.layers.N.block_sparse_moe.experts.E.w2.weight    writes
"""
)
QWEN_MOE = (
    QWEN2
    + QWEN3
    + """
model.layers.N.mlp.gate.weight                         reads
model.layers.N.mlp.experts.gate_up_proj                reads, stacked
model.layers.N.mlp.experts.down_proj                   writes, stacked
model.layers.N.mlp.experts.E.gate_proj.weight          reads
model.layers.N.mlp.experts.E.up_proj.weight            reads
model.layers.N.mlp.experts.E.down_proj.weight          writes
model.layers.N.mlp.shared_expert.gate_proj.weight      reads
model.layers.N.mlp.shared_expert.up_proj.weight        reads
model.layers.N.mlp.shared_expert.down_proj.weight      writes
model.layers.N.mlp.shared_expert_gate.weight           reads
"""
)
QWEN3_NEXT = (
    QWEN_MOE
    + """
model.layers.N.linear_attn.in_proj_qkvz.weight         reads
model.layers.N.linear_attn.in_proj_ba.weight           reads
model.layers.N.linear_attn.out_proj.weight             writes
model.layers.N.linear_attn.conv1d.weight               other
model.layers.N.linear_attn.A_log                       other
model.layers.N.linear_attn.dt_bias                     bias
model.layers.N.linear_attn.norm.weight                 norm
"""
)
LLAMA4 = (
    LLAMA
    + """
model.layers.N.feed_forward.router.weight                    reads
model.layers.N.feed_forward.experts.gate_up_proj             reads, transposed, stacked
model.layers.N.feed_forward.experts.down_proj                writes, transposed, stacked
model.layers.N.feed_forward.shared_expert.gate_proj.weight   reads
model.layers.N.feed_forward.shared_expert.up_proj.weight     reads
model.layers.N.feed_forward.shared_expert.down_proj.weight   writes
"""
)
GPT_OSS = (
    QWEN2
    + """
model.layers.N.self_attn.o_proj.bias               bias
model.layers.N.self_attn.sinks                     other
model.layers.N.mlp.router.weight                   reads
model.layers.N.mlp.router.bias                     bias
model.layers.N.mlp.experts.gate_up_proj            reads, transposed, stacked
model.layers.N.mlp.experts.gate_up_proj_bias       bias
model.layers.N.mlp.experts.down_proj               writes, transposed, stacked
model.layers.N.mlp.experts.down_proj_bias          bias
"""
)
GPT2 = """
transformer.wte.weight                             vocabulary
transformer.wpe.weight                             other
transformer.h.N.attn.c_attn.weight                 reads, transposed
transformer.h.N.attn.c_attn.bias                   bias
transformer.h.N.attn.c_proj.weight                 writes, transposed
transformer.h.N.attn.c_proj.bias                   bias
transformer.h.N.crossattention.c_attn.weight       reads, transposed
transformer.h.N.crossattention.c_attn.bias         bias
transformer.h.N.crossattention.q_attn.weight       reads, transposed
transformer.h.N.crossattention.q_attn.bias         bias
transformer.h.N.crossattention.c_proj.weight       writes, transposed
transformer.h.N.crossattention.c_proj.bias         bias
transformer.h.N.ln_cross_attn.weight               norm
transformer.h.N.ln_cross_attn.bias                 bias
transformer.h.N.mlp.c_fc.weight                    reads, transposed
transformer.h.N.mlp.c_fc.bias                      bias
transformer.h.N.mlp.c_proj.weight                  writes, transposed
transformer.h.N.mlp.c_proj.bias                    bias
transformer.h.N.ln_1.weight                        norm
transformer.h.N.ln_1.bias                          bias
transformer.h.N.ln_2.weight                        norm
transformer.h.N.ln_2.bias                          bias
transformer.ln_f.weight                            norm
transformer.ln_f.bias                              bias
lm_head.weight                                     head
score.weight                                       reads
"""
BIGCODE = GPT2.replace(", transposed", "")  # the names of GPT-2 on ordinary linear layers
GPT_NEOX = """
gpt_neox.embed_in.weight                                vocabulary
gpt_neox.layers.N.attention.query_key_value.weight      reads
gpt_neox.layers.N.attention.query_key_value.bias        bias
gpt_neox.layers.N.attention.dense.weight                writes
gpt_neox.layers.N.attention.dense.bias                  bias
gpt_neox.layers.N.mlp.dense_h_to_4h.weight              reads
gpt_neox.layers.N.mlp.dense_h_to_4h.bias                bias
gpt_neox.layers.N.mlp.dense_4h_to_h.weight              writes
gpt_neox.layers.N.mlp.dense_4h_to_h.bias                bias
gpt_neox.layers.N.input_layernorm.weight                norm
gpt_neox.layers.N.input_layernorm.bias                  bias
gpt_neox.layers.N.post_attention_layernorm.weight       norm
gpt_neox.layers.N.post_attention_layernorm.bias         bias
gpt_neox.final_layer_norm.weight                        norm
gpt_neox.final_layer_norm.bias                          bias
embed_out.weight                                        head
lm_head.weight                                          head
"""
OPT = """
model.decoder.embed_tokens.weight                       vocabulary
model.decoder.embed_positions.weight                    other
model.decoder.project_in.weight                         writes
model.decoder.project_out.weight                        reads
model.decoder.layers.N.self_attn.q_proj.weight          reads
model.decoder.layers.N.self_attn.q_proj.bias            bias
model.decoder.layers.N.self_attn.k_proj.weight          reads
model.decoder.layers.N.self_attn.k_proj.bias            bias
model.decoder.layers.N.self_attn.v_proj.weight          reads
model.decoder.layers.N.self_attn.v_proj.bias            bias
model.decoder.layers.N.self_attn.out_proj.weight        writes
model.decoder.layers.N.self_attn.out_proj.bias          bias
model.decoder.layers.N.self_attn_layer_norm.weight      norm
model.decoder.layers.N.self_attn_layer_norm.bias        bias
model.decoder.layers.N.fc1.weight                       reads
model.decoder.layers.N.fc1.bias                         bias
model.decoder.layers.N.fc2.weight                       writes
model.decoder.layers.N.fc2.bias                         bias
model.decoder.layers.N.final_layer_norm.weight          norm
model.decoder.layers.N.final_layer_norm.bias            bias
model.decoder.final_layer_norm.weight                   norm
model.decoder.final_layer_norm.bias                     bias
lm_head.weight                                          head
"""
FALCON = """
transformer.word_embeddings.weight                           vocabulary
transformer.h.N.self_attention.query_key_value.weight        reads
transformer.h.N.self_attention.dense.weight                  writes
transformer.h.N.mlp.dense_h_to_4h.weight                     reads
transformer.h.N.mlp.dense_4h_to_h.weight                     writes
transformer.h.N.input_layernorm.weight                       norm
transformer.h.N.input_layernorm.bias                         bias
transformer.h.N.ln_attn.weight                               norm
transformer.h.N.ln_attn.bias                                 bias
transformer.h.N.ln_mlp.weight                                norm
transformer.h.N.ln_mlp.bias                                  bias
transformer.ln_f.weight                                      norm
transformer.ln_f.bias                                        bias
lm_head.weight                                               head
"""
ENCODER = """
embeddings.word_embeddings.weight                            vocabulary
embeddings.position_embeddings.weight                        other
embeddings.token_type_embeddings.weight                      other
embeddings.LayerNorm.weight                                  norm
embeddings.LayerNorm.bias                                    bias
encoder.layer.N.attention.self.query.weight                  reads
encoder.layer.N.attention.self.query.bias                    bias
encoder.layer.N.attention.self.key.weight                    reads
encoder.layer.N.attention.self.key.bias                      bias
encoder.layer.N.attention.self.value.weight                  reads
encoder.layer.N.attention.self.value.bias                    bias
encoder.layer.N.attention.output.dense.weight                writes
encoder.layer.N.attention.output.dense.bias                  bias
encoder.layer.N.attention.output.LayerNorm.weight            norm
encoder.layer.N.attention.output.LayerNorm.bias              bias
encoder.layer.N.intermediate.dense.weight                    reads
encoder.layer.N.intermediate.dense.bias                      bias
encoder.layer.N.output.dense.weight                          writes
encoder.layer.N.output.dense.bias                            bias
encoder.layer.N.output.LayerNorm.weight                      norm
encoder.layer.N.output.LayerNorm.bias                        bias
pooler.dense.weight                                          reads
pooler.dense.bias                                            bias
"""
BERT = (
    ENCODER.replace("\n", "\nbert.").removesuffix("bert.")
    + """
cls.predictions.transform.dense.weight                       reads
cls.predictions.transform.dense.bias                         bias
cls.predictions.transform.LayerNorm.weight                   norm
cls.predictions.transform.LayerNorm.bias                     bias
cls.predictions.decoder.weight                               head
cls.predictions.decoder.bias                                 bias
cls.predictions.bias                                         bias
cls.seq_relationship.weight                                  other
cls.seq_relationship.bias                                    bias
classifier.weight                                            other
classifier.bias                                              bias
"""
)
BERT_TOKENS = (
    BERT
    + """
classifier.weight                                            reads
"""
)
ROBERTA = (
    ENCODER.replace("\n", "\nroberta.").removesuffix("roberta.")
    + """
lm_head.dense.weight                                         reads
lm_head.dense.bias                                           bias
lm_head.layer_norm.weight                                    norm
lm_head.layer_norm.bias                                      bias
lm_head.decoder.weight                                       head
lm_head.decoder.bias                                         bias
lm_head.bias                                                 bias
classifier.dense.weight                                      reads
classifier.dense.bias                                        bias
classifier.out_proj.weight                                   other
classifier.out_proj.bias                                     bias
"""
)
T5 = """
shared.weight                                                vocabulary
encoder.embed_tokens.weight                                  vocabulary
decoder.embed_tokens.weight                                  vocabulary
encoder.block.N.layer.0.SelfAttention.q.weight               reads
encoder.block.N.layer.0.SelfAttention.k.weight               reads
encoder.block.N.layer.0.SelfAttention.v.weight               reads
encoder.block.N.layer.0.SelfAttention.o.weight               writes
encoder.block.N.layer.0.SelfAttention.relative_attention_bias.weight   other
encoder.block.N.layer.0.layer_norm.weight                    norm
encoder.block.N.layer.1.DenseReluDense.wi.weight             reads
encoder.block.N.layer.1.DenseReluDense.wi_0.weight           reads
encoder.block.N.layer.1.DenseReluDense.wi_1.weight           reads
encoder.block.N.layer.1.DenseReluDense.wo.weight             writes
encoder.block.N.layer.1.layer_norm.weight                    norm
encoder.final_layer_norm.weight                              norm
decoder.block.N.layer.0.SelfAttention.q.weight               reads
decoder.block.N.layer.0.SelfAttention.k.weight               reads
decoder.block.N.layer.0.SelfAttention.v.weight               reads
decoder.block.N.layer.0.SelfAttention.o.weight               writes
decoder.block.N.layer.0.SelfAttention.relative_attention_bias.weight   other
decoder.block.N.layer.0.layer_norm.weight                    norm
decoder.block.N.layer.1.EncDecAttention.q.weight             reads
decoder.block.N.layer.1.EncDecAttention.k.weight             reads
decoder.block.N.layer.1.EncDecAttention.v.weight             reads
decoder.block.N.layer.1.EncDecAttention.o.weight             writes
decoder.block.N.layer.1.layer_norm.weight                    norm
decoder.block.N.layer.2.DenseReluDense.wi.weight             reads
decoder.block.N.layer.2.DenseReluDense.wi_0.weight           reads
decoder.block.N.layer.2.DenseReluDense.wi_1.weight           reads
decoder.block.N.layer.2.DenseReluDense.wo.weight             writes
decoder.block.N.layer.2.layer_norm.weight                    norm
decoder.final_layer_norm.weight                              norm
lm_head.weight                                               head
"""

HIDDEN, VOCAB = 32, 96
# Two query heads per key-value head, and as many rows in q as columns: square, so that names must decide.
DECODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
}
MOE = {**DECODER, "num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BERTS = {k: v for k, v in DECODER.items() if k not in ("head_dim", "num_key_value_heads")}
T5S = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
GPT2S = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB}
OPTS = {"hidden_size": HIDDEN, "ffn_dim": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
VISION = {  # as wide as the language model: only its place tells it apart
    "hidden_size": HIDDEN,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "vision_use_head": False,
}

# name: (config class, model class, config, table, the latent space as written by hand)
NORMED = {"final_norm": "model.norm.weight", "norm_offset": 0.0, "norm_kind": "rms"}
GEMMAS = {**NORMED, "norm_offset": 1.0}
LM_HEAD = {"head": "lm_head.weight", "tied": False}
EMBEDDED = {"head": "model.embed_tokens.weight", "tied": True}
NO_NORM = {"final_norm": None, "norm_offset": 0.0, "norm_kind": None}


def layer_norm(name: str) -> dict[str, Any]:
    return {"final_norm": name, "norm_offset": 0.0, "norm_kind": "layer"}


CASES: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any] | None]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, **UNTIED}, LLAMA, {**LM_HEAD, **NORMED}),
    "llama square": (  # every matrix of a layer but k and v is square
        "LlamaConfig",
        "LlamaForCausalLM",
        {**DECODER, "intermediate_size": HIDDEN, "vocab_size": HIDDEN, **UNTIED},
        LLAMA,
        {**LM_HEAD, **NORMED},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**DECODER, **UNTIED}, LLAMA, {**LM_HEAD, **NORMED}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**DECODER, **TIED}, QWEN2, {**EMBEDDED, **NORMED}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**DECODER, **UNTIED}, QWEN3, {**LM_HEAD, **NORMED}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**DECODER, **TIED}, GEMMA3, {**EMBEDDED, **GEMMAS}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**DECODER, **TIED}, GEMMA3, {**EMBEDDED, **GEMMAS}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**DECODER, **TIED}, GEMMA3, {**EMBEDDED, **GEMMAS}),
    "gemma3 vision": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {"text_config": DECODER, "vision_config": {**VISION, "hidden_size": 40}, "mm_tokens_per_image": 4},
        GEMMA3_VISION,
        {
            "head": "model.language_model.embed_tokens.weight",
            "tied": True,
            **GEMMAS,
            "final_norm": "model.language_model.norm.weight",
        },
    ),
    "gemma3 vision square": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {"text_config": DECODER, "vision_config": VISION, "mm_tokens_per_image": 4},
        GEMMA3_VISION,
        None,
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**DECODER, **UNTIED}, PHI3, {**LM_HEAD, **NORMED}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        GPT2S,
        GPT2,
        {"head": "transformer.wte.weight", "tied": True, **layer_norm("transformer.ln_f.weight")},
    ),
    "gpt2 cross": ("GPT2Config", "GPT2LMHeadModel", {**GPT2S, "add_cross_attention": True}, GPT2, None),
    "gpt2 square": ("GPT2Config", "GPT2LMHeadModel", {**GPT2S, "n_inner": HIDDEN}, GPT2, None),
    "gpt2 classifier": ("GPT2Config", "GPT2ForSequenceClassification", GPT2S, GPT2, None),
    "bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {**GPT2S, "n_inner": 56}, BIGCODE, None),
    "gpt-neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**DECODER, **UNTIED},
        GPT_NEOX,
        {"tied": False, **layer_norm("gpt_neox.final_layer_norm.weight")},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        OPTS,
        OPT,
        {
            "head": "model.decoder.embed_tokens.weight",
            "tied": True,
            **layer_norm("model.decoder.final_layer_norm.weight"),
        },
    ),
    "opt-350m": (
        "OPTConfig",
        "OPTForCausalLM",
        {**OPTS, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        OPT,
        None,
    ),
    "falcon-7b": (
        "FalconConfig",
        "FalconForCausalLM",
        {**BERTS, "multi_query": True, "new_decoder_architecture": False, "bias": False},
        FALCON,
        {"head": "transformer.word_embeddings.weight", "tied": True, **layer_norm("transformer.ln_f.weight")},
    ),
    "falcon-40b": (
        "FalconConfig",
        "FalconForCausalLM",
        {**BERTS, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": False},
        FALCON,
        None,
    ),
    "bert": (
        "BertConfig",
        "BertForPreTraining",
        BERTS,
        BERT,
        {
            "head": "bert.embeddings.word_embeddings.weight",
            "tied": True,
            **layer_norm("cls.predictions.transform.LayerNorm.weight"),
        },
    ),
    "bert model": (
        "BertConfig",
        "BertModel",
        BERTS,
        ENCODER,
        {"head": "embeddings.word_embeddings.weight", "tied": True, **NO_NORM},
    ),
    "bert sequences": ("BertConfig", "BertForSequenceClassification", BERTS, BERT, None),
    "bert tokens": ("BertConfig", "BertForTokenClassification", BERTS, BERT_TOKENS, None),
    "roberta": (
        "RobertaConfig",
        "RobertaForMaskedLM",
        BERTS,
        ROBERTA,
        {
            "head": "roberta.embeddings.word_embeddings.weight",
            "tied": True,
            **layer_norm("lm_head.layer_norm.weight"),
        },
    ),
    "roberta sequences": ("RobertaConfig", "RobertaForSequenceClassification", BERTS, ROBERTA, None),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**MOE, **UNTIED}, MIXTRAL, {**LM_HEAD, **NORMED}),
    "mixtral square": (  # gate_up_proj is [E, d, d]
        "MixtralConfig",
        "MixtralForCausalLM",
        {**MOE, "intermediate_size": HIDDEN // 2, **UNTIED},
        MIXTRAL,
        None,
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**MOE, "shared_expert_intermediate_size": 40, **UNTIED},
        QWEN_MOE,
        {**LM_HEAD, **NORMED},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**MOE, **UNTIED}, QWEN_MOE, {**LM_HEAD, **NORMED}),
    "qwen3-next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **MOE,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 40,
            **UNTIED,
        },
        QWEN3_NEXT,
        {**LM_HEAD, **GEMMAS},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {**MOE, "intermediate_size": 24, "intermediate_size_mlp": 56, **UNTIED},
        LLAMA4,
        {**LM_HEAD, **NORMED},
    ),
    "gpt-oss": (  # its experts are as wide as its stream
        "GptOssConfig",
        "GptOssForCausalLM",
        {**MOE, "intermediate_size": HIDDEN, **UNTIED},
        GPT_OSS,
        {**LM_HEAD, **NORMED},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        T5S,
        T5,
        {"head": "shared.weight", "tied": True, **NORMED, "final_norm": "decoder.final_layer_norm.weight"},
    ),
    "t5 gated": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**T5S, "feed_forward_proj": "gated-gelu"},
        T5,
        None,
    ),
    "t5 encoder": (
        "T5Config",
        "T5EncoderModel",
        T5S,
        T5,
        {"head": "shared.weight", "tied": True, **NORMED, "final_norm": "encoder.final_layer_norm.weight"},
    ),
    # Final norms of other kinds: 1 + gain with a mean and a bias, and a mean without a bias.
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {**DECODER, **UNTIED}, NEMOTRON, None),
    "cohere": ("CohereConfig", "CohereForCausalLM", DECODER, QWEN3, None),
}
WITH_LATENT = [name for name, case in CASES.items() if case[4] is not None]


@functools.cache
def model(case: str) -> Any:
    import transformers

    config_class, model_class, entries, *_ = CASES[case]
    config = getattr(transformers, config_class)(**entries)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, model_class)(config).eval()


def config_of(case: str) -> dict[str, Any]:
    """config.json as save_pretrained writes it."""
    found: dict[str, Any] = json.loads(model(case).config.to_json_string())
    return found


def shapes_of(case: str) -> Shapes:
    """The tensors that are stored: a tied one once."""
    found, seen = {}, set()
    for name, x in model(case).state_dict().items():
        if x.data_ptr() not in seen:
            seen.add(x.data_ptr())
            found[name] = tuple(x.shape)
    return found


def rows(table: str) -> dict[str, str]:
    return dict(re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if line.strip())


def general(name: str) -> str:
    name = re.sub(r"experts\.\d+\.", "experts.E.", name)
    return re.sub(r"((?:^|\.)(?:layers?|h|block))\.\d+\.", r"\1.N.", name, count=1)


def check_against(table: str, config: Mapping[str, Any], shapes: Shapes) -> dict[str, TensorRole]:
    found = roles(config, shapes)
    expected = rows(table)
    assert list(found) == list(shapes)
    assert {name: str(role) for name, role in found.items()} == {
        name: f"{expected.get(general(name), 'no row in the table')} (name)" for name in shapes
    }
    check_axes(found, shapes, HIDDEN)
    return found


def check_axes(found: Mapping[str, TensorRole], shapes: Shapes, width: int) -> None:
    """What the roles say of the stream's side is true of the shapes."""
    for name, role in found.items():
        count, out, in_ = role.matrices(shapes[name])
        assert count * out * in_ == torch.Size(shapes[name]).numel()
        if role.role is Role.READS:
            assert (role.latent_axis, in_) == ("in", width), name
        elif role.role is Role.WRITES:
            assert (role.latent_axis, out) == ("out", width), name
        elif role.role in (Role.VOCABULARY, Role.HEAD):
            assert role.latent_axis == ("in" if in_ == width else None), name
        else:
            assert role.latent_axis is None, name


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_the_role_of_its_table(case):
    check_against(CASES[case][3], config_of(case), shapes_of(case))


# Not OPT-350m, whose embedding is narrower than its stream, nor vision towers, which the config announces.
@pytest.mark.parametrize("case", [c for c in CASES if c != "opt-350m" and "vision" not in c])
def test_names_and_orientation_need_no_config(case):
    check_against(CASES[case][3], {}, shapes_of(case))


@pytest.mark.parametrize(
    ("case", "table", "experts"),
    [("mixtral", MIXTRAL_FILES, 9), ("qwen2-moe", QWEN_MOE, 9), ("qwen3-moe", QWEN_MOE, 9)],
)
def test_files_hold_experts_one_by_one(case, table, experts, tmp_path: Path):
    model(case).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    assert sum(".layers.1." in name and ".experts." in name for name in shapes) == experts
    check_against(table, json.loads((tmp_path / "config.json").read_text()), shapes)


@pytest.mark.parametrize("case", WITH_LATENT)
def test_latent_space_of_every_family(case):
    found = latent(config_of(case), shapes_of(case))
    expected = {"head": found.head, **(CASES[case][4] or {})}
    assert found == Latent(hidden_size=CASES[case][2].get("hidden_size", HIDDEN), **expected)
    assert found.head in ("embed_out.weight", "lm_head.weight") if case == "gpt-neox" else True
    # Alphabetical files give the same answer as the order of the modules.
    assert latent(config_of(case), dict(sorted(shapes_of(case).items()))) == found


@pytest.mark.parametrize("case", [*WITH_LATENT, "nemotron", "cohere"])
def test_final_norm_computes_what_offset_and_kind_say(case):
    found = latent(config_of(case), shapes_of(case))
    if found.final_norm is None:
        return
    norm = model(case).get_submodule(found.final_norm.removesuffix(".weight"))
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)) + 3
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(2))
        centred = x - x.mean(-1, keepdim=True) if found.norm_kind == "layer" else x
        expected = centred / centred.square().mean(-1, keepdim=True).sqrt() * (norm.weight + found.norm_offset)
        bias = getattr(norm, "bias", None)
        # float32, and an epsilon of at most 1e-5 beside a mean square of about 1 (about 10 if not centred)
        torch.testing.assert_close(norm(x), expected + (0 if bias is None else bias), rtol=1e-4, atol=1e-4)


def test_a_stored_head_is_the_head_whatever_the_config_ties():
    shapes = {**shapes_of("t5 gated"), "lm_head.weight": (96, 32)}
    expected = Latent(32, "lm_head.weight", False, "decoder.final_layer_norm.weight", 0.0, "rms")
    for tie in (TIED, UNTIED, {}):
        assert latent({**config_of("t5 gated"), **tie}, shapes) == expected


def test_latent_takes_no_tensor_of_a_layer_and_none_of_the_prediction_module():
    shapes = {
        "mtp.norm.weight": (32,),
        "model.norm.weight": (32,),
        "model.embed_tokens.weight": (96, 32),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.1.embed_tokens.weight": (96, 32),
        "model.layers.1.shared_head.norm.weight": (32,),
        "model.layers.1.shared_head.head.weight": (96, 32),
        "lm_head.weight": (96, 32),
    }
    for order in (list(shapes), list(reversed(shapes))):
        found = latent({"hidden_size": 32}, {name: shapes[name] for name in order})
        assert found == Latent(32, "lm_head.weight", False, "model.norm.weight", 0.0, "rms")


def test_latent_takes_the_norm_of_the_heads_transform_before_that_of_the_stream():
    shapes = {
        "model.embeddings.tok_embeddings.weight": (96, 32),
        "model.embeddings.norm.weight": (32,),
        "head.dense.weight": (32, 32),
        "head.norm.weight": (32,),
        "model.final_norm.weight": (32,),
    }
    config = {"hidden_size": 32, "model_type": "modernbert"}
    expected = Latent(32, "model.embeddings.tok_embeddings.weight", True, "head.norm.weight", 0.0, "layer")
    for order in (list(shapes), list(reversed(shapes))):
        assert latent(config, {name: shapes[name] for name in order}) == expected


def test_latent_without_labels_is_an_error():
    with pytest.raises(CheckpointError, match=r"hidden_size 32; found .*embed_tokens.weight \[96, 16\]"):
        latent(config_of("opt-350m"), shapes_of("opt-350m"))
    with pytest.raises(CheckpointError, match="name one under roles"):
        latent({"hidden_size": 32}, {"a.weight": (32, 48)})
    named = parse([{"filter": "a", "role": "head"}, {"filter": "b", "role": "norm"}])
    found = latent({"hidden_size": 32}, {"a": (48, 32), "b": (32,), "model.norm.weight": (16,)}, named)
    assert found == Latent(32, "a", False, "b", 0.0, "rms")


def anonymous(shapes: Shapes, keep_ends: bool) -> dict[str, str]:
    """Names that say nothing; with ``keep_ends`` weight and bias of a module still belong together."""
    if not keep_ends:
        return {name: f"x{i}" for i, name in enumerate(shapes)}
    modules = {name: re.sub(r"\.(weight|bias)$", "", name) for name in shapes}
    numbers = {module: f"m{i}" for i, module in enumerate(dict.fromkeys(modules.values()))}
    return {name: numbers[module] + name.removeprefix(module) for name, module in modules.items()}


ANONYMOUS = ("llama", "qwen2", "phi3", "falcon-40b", "t5", "gpt2", "mixtral", "opt-350m")


# Without names and biases nothing shows that GPT-2's matrices are transposed.
@pytest.mark.parametrize(
    ("case", "keep_ends"), [(c, True) for c in ANONYMOUS] + [(c, False) for c in ANONYMOUS if c != "gpt2"]
)
def test_shapes_decide_when_names_do_not(case, keep_ends):
    shapes = shapes_of(case)
    new = anonymous(shapes, keep_ends)
    by_name = roles(config_of(case), shapes)
    renamed = {new[name]: shape for name, shape in shapes.items()}
    found = roles(config_of(case), renamed)
    check_axes(found, renamed, HIDDEN)
    for name, expected in by_name.items():
        got = found[new[name]]
        _, out, in_ = expected.matrices(shapes[name])
        if expected.role in (Role.READS, Role.WRITES):
            assert got.source == "structure"
            assert (got.transposed, got.batch) == (expected.transposed, expected.batch), name
            assert got.role is (expected.role if out != in_ else Role.READS), name
        elif expected.role in (Role.VOCABULARY, Role.HEAD) and in_ == HIDDEN:
            assert got.role is expected.role, name
        elif expected.role is Role.BIAS:
            assert got.role is (Role.BIAS if keep_ends else Role.OTHER)
        elif len(shapes[name]) == 1:
            assert got == TensorRole(Role.OTHER, source="structure")


def test_a_matrix_between_inner_spaces_is_other():
    """Multi-head latent attention: down-projections read the stream, what comes after them does not."""
    shapes = {
        "model.layers.0.self_attn.q_a_proj.weight": (12, 32),
        "model.layers.0.self_attn.q_a_layernorm.weight": (12,),
        "model.layers.0.self_attn.q_b_proj.weight": (40, 12),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (20, 32),
        "model.layers.0.self_attn.kv_b_proj.weight": (48, 16),
        "model.layers.0.self_attn.o_proj.weight": (32, 24),
        "model.layers.0.mlp.gate.e_score_correction_bias": (4,),
        # Cross-attention over an encoder of width 24 whose keys are as wide as this stream:
        "model.layers.0.cross_attn.k_proj.weight": (32, 24),
    }
    found = roles({"hidden_size": 32}, shapes)
    assert [str(r) for r in found.values()] == [
        "reads (name)",
        "norm (name)",
        "other (structure)",
        "reads (name)",
        "other (structure)",
        "writes (name)",
        "bias (name)",
        "other (structure)",
    ]


def test_stacked_experts_without_a_name_are_known_by_their_number():
    shapes = {"mix.a.weight": (3, 48, 32), "mix.b.weight": (3, 32, 24), "conv.weight": (48, 32, 3)}
    found = roles({"hidden_size": 32, "num_local_experts": 3}, shapes)
    assert [str(r) for r in found.values()] == [
        "reads, stacked (structure)",
        "writes, stacked (structure)",
        "other (structure)",
    ]
    assert found["mix.a.weight"].matrices((3, 48, 32)) == (3, 48, 32)
    assert found["conv.weight"].matrices((48, 32, 3)) == (1, 48, 96)


def test_names_that_shapes_would_misread():
    shapes = {
        "model.multi_modal_projector.linear_1.weight": (32, 40),
        "model.multi_modal_projector.linear_2.weight": (32, 32),
        "model.multi_modal_projector.norm.weight": (32,),
        "embeddings.x_position_embeddings.weight": (64, 32),
        "embeddings.token_type_embeddings_0.weight": (3, 32),
        "layers.0.attention.attn.o.weight": (32, 32),
        "layers.0.experts.output_linear.weight": (3, 32, 32),
        "rwkv.embeddings.weight": (96, 32),  # as many rows as labels: not of positions
    }
    config = {"hidden_size": 32, "vocab_size": 96}
    assert [str(r) for r in roles(config, shapes).values()] == [
        "other (name)",
        "writes (name)",
        "norm (name)",
        "other (name)",
        "other (name)",
        "writes (name)",
        "writes, stacked (name)",
        "vocabulary (structure)",
    ]
    assert latent(config, shapes) == Latent(32, "rwkv.embeddings.weight", True, None, 0.0, None)


def test_a_bias_shows_the_storage_of_its_matrix_in_a_mixed_checkpoint():
    """CLVP: linear layers in the attention, GPT-2's Conv1D in the MLP."""
    shapes = {f"layers.0.attn.{n}_proj.weight": (32, 32) for n in "qkv"} | {
        f"layers.0.attn.{n}": (16, 32) for n in "ab"
    }
    shapes |= {"layers.0.mlp.c_fc.weight": (32, 56), "layers.0.mlp.c_fc.bias": (56,)}
    shapes |= {"layers.0.x.weight": (56, 32), "layers.0.x.bias": (56,), "layers.0.y.weight": (48, 32)}
    shapes |= {"layers.0.y.bias": (48,)}
    found = roles({"hidden_size": 32}, shapes)
    assert str(found["layers.0.attn.q_proj.weight"]) == "reads (name)"
    assert str(found["layers.0.mlp.c_fc.weight"]) == "reads, transposed (name)"
    assert str(found["layers.0.y.weight"]) == "reads (structure)"
    assert str(found["layers.0.attn.a"]) == "reads (structure)"


def test_dbrx_keeps_all_experts_in_one_matrix():
    mlp = "transformer.blocks.0.ffn.experts.mlp."
    shapes = {f"{mlp}w1": (120, 32), f"{mlp}v1": (120, 32), f"{mlp}w2": (120, 32)}
    found = roles({"d_model": 32}, shapes)
    assert [str(r) for r in found.values()] == ["reads (name)", "reads (name)", "writes, transposed (name)"]
    assert found[f"{mlp}w2"].matrices((120, 32)) == (1, 32, 120)


def test_buffers_and_scalars_are_other():
    shapes = {
        "h.0.attn.bias": (1, 1, 64, 64),
        "h.0.attn.masked_bias": (),
        "bert.embeddings.position_ids": (1, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
        "logit_scale": (),
        "empty": (0, 32),
    }
    found = roles({"hidden_size": 32}, shapes)
    assert [found[n].role for n in shapes if n != "empty"] == [Role.OTHER] * 5
    assert found["logit_scale"].matrices(()) == (1, 1, 1)
    assert found["empty"].role is Role.READS


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"hidden_size": 7}, 7),
        ({"n_embd": 7}, 7),
        ({"d_model": 7}, 7),
        ({"hidden_size": 5, "text_config": {"hidden_size": 7}}, 7),
        ({"thinker_config": {"text_config": {"hidden_size": 7}}}, 7),
        ({"hidden_size": 7, "text_config": {"model_type": "llama"}}, 7),
        ({"text_config": {"model_type": "llama"}}, 9),  # transformers leaves out what is a class's default
        ({"hidden_size": True}, 9),
        ({"hidden_size": "7"}, 9),
        ({"hidden_size": -7}, 9),
        ({"text_config": [7]}, 9),
        ({}, 9),
    ],
)
def test_hidden_size(config, width):
    assert hidden_size(config, {"a.weight": (11, 13), "wte.weight": (20, 9)}) == width


def test_hidden_size_without_config_and_embedding_is_the_commonest_axis():
    assert hidden_size({}, {"a": (11, 9), "b": (9, 13), "c": (9, 9), "d": (13,), "e": (13, 13, 13)}) == 9
    assert hidden_size({}, {"a": (3,)}) == 0
    assert roles({}, {}) == {}


def test_layers():
    assert layer("model.layers.12.mlp.experts.3.w1.weight") == ("model.layers", 12)
    assert layer("encoder.block.0.layer.1.layer_norm.weight") == ("encoder.block", 0)
    assert layer("model.norm.weight") is None
    assert layer("ln_1.weight") is None
    assert layers(shapes_of("t5")) == {"encoder.block": 2, "decoder.block": 2}
    assert layers(["lm_head.weight"]) == {}


def test_recipe_decides_before_names():
    shapes = {**shapes_of("gpt2"), "mixer.7.lora": (32, 16), "mixer.8.lora": (16, 32), "stack": (3, 32, 16)}
    entries = parse(
        [
            {"filter": r"mixer\.7\.", "role": "reads", "transposed": True},
            {"filter": "mixer", "role": "writes"},  # stored as the rest of the checkpoint, [in, out]
            {"filter": "stack", "role": "writes", "batch": 1, "transposed": False},
            {"filter": r"h\.0\..*c_attn.weight$", "role": "other"},
            {"filter": "wpe", "role": "vocabulary"},
            {"filter": r"ln_f\.bias", "role": "norm"},
        ]
    )
    assert entries[1] == Override("mixer", Role.WRITES, None, None, "roles[1]")
    found = roles(config_of("gpt2"), shapes, entries)
    assert str(found["mixer.7.lora"]) == "reads, transposed (recipe)"
    assert str(found["mixer.8.lora"]) == "writes, transposed (recipe)"
    assert found["stack"] == TensorRole(Role.WRITES, False, 1, "out", "recipe")
    assert str(found["transformer.h.0.attn.c_attn.weight"]) == "other, transposed (recipe)"
    assert str(found["transformer.h.1.attn.c_attn.weight"]) == "reads, transposed (name)"
    assert found["transformer.wpe.weight"] == TensorRole(Role.VOCABULARY, latent_axis="in", source="recipe")
    assert found["transformer.ln_f.bias"] == TensorRole(Role.NORM, source="recipe")
    everything = roles(config_of("gpt2"), shapes, parse([{"filter": "*", "role": "other"}]))
    assert {r.role for r in everything.values()} == {Role.OTHER}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"filter": "a", "role": "reads"}, r"^roles: expected a list"),
        (["a"], r"^roles\[0\]: expected \{filter"),
        ([{"filter": "a", "role": "reads"}, {"filter": "a", "role": "raeds"}], r"^roles\[1\]\.role: .*mean 'reads'"),
        ([{"filter": "a", "role": 3}], r"^roles\[0\]\.role: 3: no such role; known: reads"),
        ([{"filter": "a"}], r"^roles\[0\]\.role: None"),
        ([{"filter": "a", "rule": "reads"}], r"^roles\[0\]\.rule: unknown key; did you mean 'role'"),
        ([{"filter": "a", "role": "reads", 3: 4}], r"^roles\[0\]\.3: unknown key"),
        ([{"filter": "(", "role": "reads"}], r"^roles\[0\]\.filter: '\(': not a regular expression"),
        ([{"filter": "", "role": "reads"}], r"^roles\[0\]\.filter: ''"),
        ([{"role": "reads"}], r"^roles\[0\]\.filter: None"),
        ([{"filter": "a", "role": "reads", "transposed": "yes"}], r"^roles\[0\]\.transposed: 'yes': expected true"),
        ([{"filter": "a", "role": "reads", "batch": -1}], r"^roles\[0\]\.batch: -1"),
        ([{"filter": "a", "role": "reads", "batch": True}], r"^roles\[0\]\.batch: True"),
    ],
)
def test_recipe_mistakes_are_named_with_their_place(value, message):
    with pytest.raises(ConfigError, match=message):
        parse(value)
    assert parse(None) == ()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"filter": "nothing", "role": "reads"}, r"roles\[0\]\.filter: 'nothing' matches no tensor"),
        ({"filter": "wide", "role": "reads"}, r"roles\[0\]: wide has shape \[32, 16\], stored as \[out, in\]; .* 32"),
        ({"filter": "wide", "role": "writes", "transposed": True}, r"stored as \[in, out\]; what writes has an out"),
        ({"filter": "line", "role": "head"}, r"roles\[0\]: line has shape \[32\]; head needs a matrix"),
        ({"filter": "line", "role": "norm", "transposed": True}, r"line has shape \[32\]; norm needs a matrix"),
        ({"filter": "wide", "role": "reads", "batch": 1}, r"roles\[0\]\.batch: wide .* do not leave a matrix"),
    ],
)
def test_recipe_that_does_not_fit_the_checkpoint(entry, message):
    with pytest.raises(ConfigError, match=message):
        roles({"hidden_size": 32}, {"wide": (32, 16), "line": (32,)}, parse([entry]))


def test_import_needs_no_torch():
    code = "import sys, seme.roles; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
