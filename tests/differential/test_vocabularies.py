"""Vocabularies that differ, against mergekit 0.1.5: the same tokens, and for each of them the same rows.

mergekit numbers the new tokens of a union by the order of a hash table, so rows are compared by their tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template

import pytest
import torch

import seme
from seme.checkpoint.tokenizer import vocabulary
from seme.errors import ConfigError

from ..checkpoints import CONFIG, decoder, read, tokenizer, write
from .compare import ulp
from .oracle import Oracle, OracleError
from .test_mergekit import run_both

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = {
    "base": ["<unk>", "a", "b", "c", "d", "e", "f"],
    "a": ["<unk>", "b", "a", "x", "y", "d"],
    "b": ["<unk>", "a", "y", "z", "e", "c", "g", "x"],
}
PADDED = {"base": 11, "a": 6, "b": 16}
"""Rows of the embeddings, some of which no token has."""


def make(folder: Path, member: str, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A llama with a vocabulary of its own."""
    rows = PADDED[member]
    tensors = decoder(sum(member.encode()), dtype, head=not tied, layers=1, vocab=rows)
    config = {**CONFIG, "num_hidden_layers": 1, "vocab_size": rows, "tie_word_embeddings": tied}
    return tokenizer(write(folder / member, tensors, config), WORDS[member])


def add_special(folder: Path, token: str) -> None:
    """Append an added token to a tokenizer, with the next id."""
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    size = len(data["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"].append({"id": size, "content": token, **flags})
    data["model"]["vocab"][token] = size
    file.write_text(json.dumps(data))


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    return {m: str(make(tmp_path, m)) for m in WORDS}


def compare(ours: Path, theirs: Path, ulps: Mapping[str, float] | None = None) -> tuple[dict[str, int], torch.Tensor]:
    """Assert that the outputs agree, tensors of the vocabulary token by token; ``ulps`` allows distances by token.

    Returns:
        Token to id, and the embedding, of the output.
    """
    mine, other = read(ours), read(theirs)
    ids, their_ids = vocabulary(ours), vocabulary(theirs)
    assert ids is not None
    assert their_ids is not None
    assert set(ids) == set(their_ids)
    assert set(mine) == set(other)
    for name, tensor in mine.items():
        assert tensor.shape == other[name].shape, name
        if name not in (EMBED, HEAD):
            assert torch.equal(tensor, other[name]), name
            continue
        for token, i in ids.items():
            a, b = tensor[i].double(), other[name][their_ids[token]].double()
            allowed = (ulps or {}).get(token, 0) * ulp(torch.maximum(a.abs(), b.abs()), tensor.dtype)
            assert bool(((a - b).abs() <= allowed).all()), (name, token)
        # Padding is the mean of all rows, which mergekit takes in float32 and seme in float64.
        rest, theirs_rest = tensor[len(ids) :], other[name][len(ids) :]
        assert torch.allclose(rest, theirs_rest, rtol=1e-5, atol=1e-6), name
    configs = [json.loads((f / "config.json").read_text(encoding="utf-8")) for f in (ours, theirs)]
    assert configs[0]["vocab_size"] == configs[1]["vocab_size"] == mine[EMBED].shape[0]
    return ids, mine[EMBED]


LINEAR = """
merge_method: linear
models:
  - {model: $base, parameters: {weight: 0.5}}
  - {model: $a, parameters: {weight: 0.25}}
  - {model: $b, parameters: {weight: 0.125}}
dtype: float32
"""
TASK = """
merge_method: task_arithmetic
base_model: $base
models:
  - {model: $a, parameters: {weight: 0.5}}
  - {model: $b, parameters: {weight: 0.25}}
dtype: float32
"""
SOURCES = {
    "base": "tokenizer_source: base",
    "union": "tokenizer_source: union",
    "a": "tokenizer_source: $a",
    "b": "tokenizer: {source: $b}",
    "default": "tokenizer: {}",
    "padded": "tokenizer: {source: union, pad_to_multiple_of: 16}",
    "padded-base": "tokenizer: {source: base, pad_to_multiple_of: 4}",
    "tokens": """
tokenizer:
  source: union  # with base, mergekit takes a row of padding for a new token
  tokens:
    new: {source: {kind: zero}}
    a: {source: $b}
    x: {source: $b}
    c: {source: $b, force: true}
    e: {source: {kind: model_token, model: $b}, force: true}  # its own row there
    d: {source: {kind: model_token, model: $a, token: y}}
    f: {source: {kind: model_token, model: $b, token_id: 2}, force: true}
""",
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("recipe", [LINEAR + "base_model: $base\n", TASK], ids=["linear", "task_arithmetic"])
def test_with_a_base(recipe: str, source: str, models: dict[str, str], oracle: Oracle, tmp_path: Path) -> None:
    text = Template(recipe + source).substitute(models)
    ours, theirs = run_both(text, oracle, tmp_path, tokenizer=True)
    # seme gives the sums of three terms in float32 as mergekit does, operation by operation.
    compare(ours, theirs)


@pytest.mark.parametrize("source", ["$a", "union"])
def test_the_mean_where_there_is_no_base(source: str, models: dict[str, str], oracle: Oracle, tmp_path: Path) -> None:
    # Without a base mergekit takes the first of an unordered list for it; with a model's own tokenizer it does not
    # matter, and the tokens of a union are the same.
    text = Template(f"{LINEAR}tokenizer_source: {source}\n").substitute(models)
    ours, theirs = run_both(text, oracle, tmp_path, tokenizer=True)
    ids, merged = compare(ours, theirs)
    # y: two of the models have it, the other one gets the mean.
    rows = {m: read(Path(p))[EMBED] for m, p in models.items()}
    a, b = rows["a"][WORDS["a"].index("y")], rows["b"][WORDS["b"].index("y")]
    assert torch.allclose(merged[ids["y"]], (0.5 * (a + b) / 2 + 0.25 * a + 0.125 * b) / 0.875, rtol=1e-6)


@pytest.mark.parametrize("recipe", [LINEAR, TASK], ids=["linear", "task_arithmetic"])
def test_a_tokenizer_of_none_of_the_models(recipe: str, models: dict[str, str], oracle: Oracle, tmp_path: Path) -> None:
    """With tokens that some, all or none of them have."""
    words = ["<unk>", "y", "a", "nowhere", "x", "b"]
    tensors = decoder(9, torch.float32, layers=1, vocab=len(words))
    config = {**CONFIG, "num_hidden_layers": 1, "vocab_size": len(words)}
    apart = tokenizer(write(tmp_path / "apart", tensors, config), words)
    base = "" if recipe == TASK else "base_model: $base\n"
    text = Template(f"{recipe}{base}tokenizer_source: {apart}\n").substitute(models)
    ours, theirs = run_both(text, oracle, tmp_path, tokenizer=True)
    ids, merged = compare(ours, theirs)
    assert list(ids) == words
    assert not merged[ids["nowhere"]].any()


def test_16_bit_means_are_rounded_as_mergekit_does_with_compat(oracle: Oracle, tmp_path: Path) -> None:
    models = {m: str(make(tmp_path, m, dtype=torch.bfloat16)) for m in WORDS}
    text = Template(f"{LINEAR}tokenizer_source: $a\ncompat: mergekit\n".replace("dtype: float32\n", ""))
    ours, theirs = run_both(text.substitute(models), oracle, tmp_path, tokenizer=True)
    compare(ours, theirs)


def test_tied_and_untied_models(models: dict[str, str], oracle: Oracle, tmp_path: Path) -> None:
    tied = {**models, "a": str(make(tmp_path / "tied", "a", tied=True))}
    text = Template(TASK + "tokenizer_source: union\n").substitute(tied)
    ours, theirs = run_both(text, oracle, tmp_path, tokenizer=True)
    compare(ours, theirs)


def test_special_tokens_keep_what_they_are(models: dict[str, str], oracle: Oracle, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    add_special(Path(models["base"]), "<s>")
    add_special(Path(models["b"]), "<im>")
    text = Template(TASK + "tokenizer: {source: union, tokens: {extra: {source: {kind: zero}}}}\n").substitute(models)
    ours, theirs = run_both(text, oracle, tmp_path, tokenizer=True)
    compare(ours, theirs)
    mine, other = (AutoTokenizer.from_pretrained(f) for f in (ours, theirs))
    assert len(mine) == len(other)
    kinds = [{t.content: t.special for t in k.added_tokens_decoder.values()} for k in (mine, other)]
    assert kinds[0] == kinds[1]
    for written in ("a b <s>x<im>f", "extra y z"):
        assert mine.tokenize(written) == other.tokenize(written)


def test_the_bytes_do_not_depend_on_threads(models: dict[str, str], tmp_path: Path) -> None:
    text = Template(LINEAR + "tokenizer: {source: union, pad_to_multiple_of: 64}\n").substitute(models)
    one = seme.merge(text, tmp_path / "one", threads=1).path
    two = seme.merge(text, tmp_path / "two", threads=3, memory="2MiB").path
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


REFUSED: dict[str, tuple[str, str]] = {
    "both": ("tokenizer_source: base\ntokenizer: {source: base}\n", "tokenizer: tokenizer_source is given too"),
    "no-such-token": (
        "tokenizer: {source: base, tokens: {f: {source: $a, force: true}}}\n",
        r"tokenizer.tokens.f.source: .* has no token 'f'",
    ),
    "id-beyond": (
        "tokenizer: {source: base, tokens: {f: {source: {kind: model_token, model: $a, token_id: 6}}}}\n",
        r"tokenizer.tokens.f.source: .* has no token '6'",
    ),
    "two-tokens": (
        "tokenizer: {tokens: {f: {source: {kind: model_token, model: $a, token_id: 1, token: b}}}}\n",
        "tokenizer.tokens.f.source: expected one of token",
    ),
    "kind": ("tokenizer: {tokens: {f: {source: {kind: one}}}}\n", "tokenizer.tokens.f.source.kind: 'one'"),
}


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED)
def test_what_mergekit_refuses_seme_refuses(
    source: str, message: str, models: dict[str, str], oracle: Oracle, tmp_path: Path
) -> None:
    text = Template(TASK + source).substitute(models)
    with pytest.raises(OracleError):
        oracle.merge(text, tmp_path / "mergekit", copy_tokenizer=False)
    with pytest.raises(ConfigError, match=f"^{message}"):
        seme.merge(text, tmp_path / "seme")
    assert not (tmp_path / "seme").exists()


def test_without_a_tokenizer_other_shapes_are_an_error_that_names_the_remedy(
    models: dict[str, str], oracle: Oracle, tmp_path: Path
) -> None:
    text = Template(TASK).substitute(models)
    with pytest.raises(OracleError):
        oracle.merge(text, tmp_path / "mergekit", copy_tokenizer=False)
    with pytest.raises(ValueError, match=r"vocabularies differ: add tokenizer_source: base, or union for the tokens"):
        seme.merge(text, tmp_path / "seme")


Models = Callable[[str, str, str], Path]


def test_gpt2(model: Models, oracle: Oracle, tmp_path: Path) -> None:
    """Tied, with a table of positions that is none of tokens."""
    source = model("gpt2", "a", "float32")
    tensors = {n: t.clone() for n, t in read(source).items()}
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:50]
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    other = tokenizer(write(tmp_path / "a", tensors, {**config, "vocab_size": 50}), [f"t{i + 20}" for i in range(50)])
    text = (
        f"merge_method: task_arithmetic\nbase_model: {model('gpt2', 'base', 'float32')}\n"
        f"models: [{{model: {other}, parameters: {{weight: 0.5}}}}]\ndtype: float32\ntokenizer_source: union\n"
    )
    ours, theirs = run_both(text, oracle, tmp_path, tokenizer=True)
    mine, their = read(ours), read(theirs)
    ids, their_ids = vocabulary(ours), vocabulary(theirs)
    assert ids is not None
    assert their_ids is not None
    order = [their_ids[t] for t in sorted(ids, key=ids.__getitem__)]
    assert mine["transformer.wte.weight"].shape[0] == 70
    for name in mine:
        expected = their[name][order] if name.endswith("wte.weight") else their[name]
        assert torch.equal(mine[name], expected), name


OWN = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("name", ["chatml", "mistral", "auto", OWN])
def test_chat_templates(name: str, models: dict[str, str], oracle: Oracle, tmp_path: Path) -> None:
    """(mergekit's alpaca, exaone and llama3 have more blanks and line breaks than the formats.)"""
    from transformers import AutoTokenizer

    for member, template in (("base", "{{ messages[0].role }}"), ("a", "x{{ bos_token }}"), ("b", "x{{ bos_token }}")):
        (Path(models[member]) / "chat_template.jinja").write_text(template)
        settings = Path(models[member]) / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "bos_token": "a", "eos_token": "b"}))
    text = Template(f"{TASK}tokenizer_source: base\nchat_template: '{name}'\n").substitute(models)
    turns = [{"role": r, "content": f"{r}!"} for r in ("system", "user", "assistant", "user")]
    said = {
        AutoTokenizer.from_pretrained(f).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        for f in run_both(text, oracle, tmp_path, tokenizer=True)
    }
    assert len(said) == 1, said
