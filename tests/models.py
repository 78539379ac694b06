"""Makers of small model folders for tests, as transformers writes them: random weights, no training, a moment each.

``llama``, ``mistral``, ``qwen2``, ``gpt2`` and ``bert`` make a model that transformers loads; ``perturbed`` makes a
fine-tune of any folder; ``raw`` writes tensors of your own. All return the folder's path. The same seed gives the
same bytes.
"""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}


def llama(path: Path, **options: Any) -> Path:
    """A LlamaForCausalLM; options as :func:`decoder`."""
    return decoder("Llama", path, **options)


def mistral(path: Path, **options: Any) -> Path:
    """A MistralForCausalLM; options as :func:`decoder`."""
    return decoder("Mistral", path, **options)


def qwen2(path: Path, *, tied: bool = True, **options: Any) -> Path:
    """A Qwen2ForCausalLM: biases, and tied embeddings by default; options as :func:`decoder`."""
    return decoder("Qwen2", path, tied=tied, **options)


def decoder(
    family: str,
    path: Path,
    *,
    seed: int = 0,
    tied: bool = False,
    layers: int = 2,
    hidden: int = 32,
    vocab: int = 96,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    tokenizer: bool = True,
    chat_template: bool = False,
    **config: Any,
) -> Path:
    """A ``{family}ForCausalLM`` with two query heads per key-value head.

    Args:
        family: the name that transformers gives the architecture, e.g. ``Llama``.
        path: the folder to make.
        seed: of the weights.
        tied: the head is the embedding and is not stored.
        layers: number of layers.
        hidden: width, a multiple of 8; there are 4 heads.
        vocab: rows of the embedding, and tokens of the tokenizer; at least 4.
        dtype: of the stored weights.
        shards: number of files; more than one come with an index.
        tokenizer: write a tokenizer of single characters.
        chat_template: write ``chat_template.jinja``.
        config: further entries of config.json.
    """
    entries = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        **TOKEN_IDS,
        **config,
    }
    return _make(
        f"{family}Config", f"{family}ForCausalLM", path, entries, seed, dtype, shards, tokenizer, chat_template
    )


def gpt2(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    vocab: int = 96,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    tokenizer: bool = True,
    chat_template: bool = False,
    **config: Any,
) -> Path:
    """A GPT2LMHeadModel: tied, fused attention, transposed weights; arguments as :func:`decoder`."""
    entries = {
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": vocab,
        **TOKEN_IDS,
        **config,
    }
    return _make("GPT2Config", "GPT2LMHeadModel", path, entries, seed, dtype, shards, tokenizer, chat_template)


def bert(
    path: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    vocab: int = 96,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    tokenizer: bool = True,
    **config: Any,
) -> Path:
    """A BertModel with its pooler, as sentence-transformers use it, and without generation_config.json.

    Arguments as :func:`decoder`.
    """
    entries = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "vocab_size": vocab,
        "pad_token_id": TOKEN_IDS["pad_token_id"],
        **config,
    }
    return _make("BertConfig", "BertModel", path, entries, seed, dtype, shards, tokenizer, chat_template=False)


def perturbed(base: Path, path: Path, seed: int, scale: float = 0.01, zeros: float = 0.3) -> Path:
    """A fine-tune of ``base``: normal noise of deviation ``scale``, on all but a share ``zeros`` of the elements.

    The noise is drawn in float32 and added before rounding to the tensor's dtype. Tensors that hold no floats, all
    other files and the split into files are those of ``base``.
    """
    path = Path(path)
    generator = torch.Generator().manual_seed(seed)

    def moved(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            return x
        noise = scale * torch.randn(x.shape, generator=generator)
        return (x.float() + noise * (torch.rand(x.shape, generator=generator) >= zeros)).to(x.dtype)

    path.mkdir(parents=True)
    for file in sorted(Path(base).iterdir()):
        if file.suffix == ".safetensors":
            tensors = {name: moved(x) for name, x in sorted(load_file(file).items())}
            save_file(tensors, path / file.name, metadata={"format": "pt"})
        elif file.suffix == ".bin":
            tensors = torch.load(file, weights_only=True)
            torch.save({name: moved(x) for name, x in tensors.items()}, path / file.name)
        else:
            shutil.copy(file, path / file.name)
    return path


def raw(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    shards: int = 1,
    kind: str = "safetensors",
    vocab: int | None = None,
    chat_template: bool = False,
) -> Path:
    """A folder with the tensors given, in their order.

    Args:
        path: the folder to make.
        tensors: the state dict. ``bin`` keeps storage that tensors share; ``safetensors`` stores each for itself.
        config: config.json; default: a Llama's architecture and nothing else.
        shards: number of files, each with as equal a number of tensors as possible; more than one come with an index.
        kind: ``safetensors`` or ``bin``.
        vocab: tokens of the tokenizer; default: no tokenizer.
        chat_template: write ``chat_template.jinja``.
    """
    path = Path(path)
    path.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} if config is None else config
    _json(path / "config.json", config)
    _json(path / "generation_config.json", {"_from_model_config": True})
    stem, suffix = {"safetensors": ("model", ".safetensors"), "bin": ("pytorch_model", ".bin")}[kind]
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = stem + (suffix if shards == 1 else f"-{i + 1:05d}-of-{shards:05d}{suffix}")
        if kind == "bin":
            torch.save({name: tensors[name] for name in part}, path / file)
        else:
            alone = {name: tensors[name].detach().clone(memory_format=torch.contiguous_format) for name in part}
            save_file(alone, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        size = sum(x.numel() * x.element_size() for x in tensors.values())
        _json(path / f"{stem}{suffix}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    if vocab is not None:
        _write_tokenizer(path, vocab)
    if chat_template:
        (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return path


def _make(
    config_class: str,
    model_class: str,
    path: Path,
    entries: Mapping[str, Any],
    seed: int,
    dtype: torch.dtype,
    shards: int,
    tokenizer: bool,
    chat_template: bool,
) -> Path:
    import transformers

    config = getattr(transformers, config_class)(**entries)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)  # or norms would be all ones and biases all zeros
    model.to(dtype)
    config.architectures, config.dtype = [model_class], dtype
    stored: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, x in model.state_dict().items():
        if x.data_ptr() not in seen:  # a tied head is not stored
            seen.add(x.data_ptr())
            stored[name] = x
    vocab = config.vocab_size if tokenizer else None
    raw(path, stored, config.to_dict(), shards=shards, vocab=vocab, chat_template=chat_template)
    (Path(path) / "generation_config.json").unlink()
    if model.can_generate():
        model.generation_config.save_pretrained(path)
    return Path(path)


def _write_tokenizer(path: Path, vocab: int) -> None:
    """A tokenizer of exactly ``vocab`` tokens: special ones, printable ASCII characters, then unused ones."""
    if vocab < len(SPECIAL_TOKENS):
        raise ValueError(f"vocab: {vocab}; a tokenizer has at least {len(SPECIAL_TOKENS)} tokens")
    characters = string.ascii_letters + " \n" + string.digits + string.punctuation
    tokens = [*SPECIAL_TOKENS.values(), *characters, *(f"<unused{i}>" for i in range(vocab))][:vocab]
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    tokenizer = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor")),
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS.values())],
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [], "unk_token": "<unk>"},
    }
    _json(path / "tokenizer.json", tokenizer)
    _json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL_TOKENS})
    _json(path / "special_tokens_map.json", SPECIAL_TOKENS)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
