"""Semantic bases: the exactness laws, the pseudo-inverse, folded norms of real models, tiles, and the cache."""

import json

import pytest
import torch
import transformers

from seme import SemanticBases
from seme.errors import BackendError, CheckpointError, SemeError
from seme.semantics import bases as module
from seme.semantics import cache
from seme.semantics.labels import by_name

from .. import models as make
from ..checkpoints import read, write

SIZES = [(1, 1), (17, 1), (64, 63), (1023, 63), (4097, 129)]
"""Odd ones; the last has two tiles of labels, the second of them a single label."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


def make_head(v, d, seed=0, decay=1.0, mean=2.0, dtype=torch.float64):
    """A head like those of real models: a few strong directions, and a mean that all rows share."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1, dtype=torch.float64) ** -(decay / 2)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    rows = (torch.randn(v, d, generator=generator, dtype=torch.float64) * scale) @ rotation
    return (rows + mean * rows.norm(dim=1).mean() * rotation[0]).to(dtype)


def make_gain(d, seed=1):
    return 1 + 0.3 * torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def error(found, expected):
    """Largest difference of a row, relative to the longest row expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm(dim=-1).max() / expected.norm(dim=-1).max())


@pytest.mark.parametrize("gain", [False, True], ids=["plain", "gain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("v", "d"), SIZES)
def test_laws(v, d, dtype, gain):
    bases = SemanticBases.from_head(make_head(v, d, dtype=dtype), make_gain(d) if gain else None)
    assert bases.rank == d
    r = torch.randn(5, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(bases.dtype)
    every = slice(0, v)
    wg, s, s_hat, b = bases.rows(every), bases.vectors(every), bases.tile(0, v), bases.dual()
    assert {x.dtype for x in (wg, s, s_hat, b)} == {torch.float64 if dtype == torch.float64 else torch.float32}
    # Sums of d terms carry rounding errors of about eps sqrt(d), which the condition of the head amplifies (for the
    # dual frame, that of the frame); those of the inverse, in float64, its square.
    eps = torch.finfo(bases.dtype).eps * d**0.5
    frame = torch.linalg.cond(bases.frame)
    bound = 4 * (eps * bases.condition**0.5 + 2.0**-53 * bases.condition)
    assert error((r @ s.T) @ wg, r) <= bound
    assert error((r @ wg.T) @ s, r) <= bound
    assert error((r @ s_hat.T) @ b, r) <= 4 * (eps * frame**0.5 + 2.0**-53 * frame)


@pytest.mark.parametrize(("v", "d"), SIZES)
def test_float64_is_the_pseudo_inverse(v, d):
    head, gain = make_head(v, d), make_gain(d)
    bases = SemanticBases.from_head(head, gain)
    expected = torch.linalg.pinv(head * gain).T
    # G has the square of the head's condition; float64 has 2^-53.
    bound = 16 * 2.0**-53 * bases.condition
    assert error(bases.vectors(slice(0, v)), expected) <= bound
    assert error(bases.matrix(), expected / expected.norm(dim=1, keepdim=True)) <= 4 * bound
    assert error(bases.norms[None], expected.norm(dim=1)[None]) <= bound


HEADS = [(0.0, 0.0), (0.0, 3.0), (1.2, 10.0), (1.4, 0.0), (2.0, 0.0), (3.0, 3.0)]
"""Decay of the spectrum and strength of the common mean."""


@pytest.mark.parametrize(("decay", "mean"), HEADS)
def test_float32_is_as_accurate_as_an_svd_in_float32(decay, mean):
    v, d = 2049, 127
    head = make_head(v, d, decay=decay, mean=mean, dtype=torch.float32)
    exact = torch.linalg.pinv(head.double()).T
    theirs = error(torch.linalg.pinv(head, rtol=0.0).T, exact)
    ours = error(SemanticBases.from_head(head).vectors(slice(0, v)), exact)
    assert ours <= 2 * theirs  # both are one rounding of float32, amplified by the condition of the head


@pytest.mark.parametrize(("decay", "mean"), HEADS)
def test_float32_products_are_used_where_they_are_good_enough(decay, mean, monkeypatch):
    """A common mean does no harm, weak directions do."""
    used = []
    exact = SemanticBases._gram
    monkeypatch.setattr(SemanticBases, "_gram", lambda self: used.append(self) or exact(self))
    head = make_head(2049, 127, decay=decay, mean=mean, dtype=torch.float32)
    SemanticBases.from_head(head, make_gain(127))
    assert bool(used) == (decay >= 2)
    SemanticBases.from_head(head.double())
    assert len(used) == 1 + (decay >= 2), "a float64 head has float64 products"


def test_float32_products_are_within_the_bound_stated():
    x = make_head(3000, 97, dtype=torch.float32)
    total = torch.zeros(97, 97, dtype=torch.float64)
    module.add_gram_(total, x)
    module.mirror_(total)
    exact, sizes = x.double().T @ x.double(), x.double().abs().T @ x.double().abs()
    assert float(((total - exact).abs() / sizes).max()) <= 3000 * 2.0**-24
    assert float(((total - exact).abs() / sizes).max()) <= 4 * 3000**0.5 * 2.0**-24
    assert not torch.equal(total, exact), "the products were float64"


def test_condition_is_close_from_below():
    head = make_head(1500, 200)
    exact = float(torch.linalg.cond(head.T @ head))
    assert 0.9 * exact <= SemanticBases.from_head(head).condition <= exact * (1 + 1e-6)


def test_half_of_the_gram_matrix_is_the_whole(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)
    x = make_head(300, 97)
    total = torch.zeros(97, 97, dtype=torch.float64)
    module.add_gram_(total, x[:111])
    module.add_gram_(total, x[111:])
    module.mirror_(total)
    torch.testing.assert_close(total, x.T @ x, rtol=1e-13, atol=0)  # the order of 300 sums in float64
    assert torch.equal(total, total.T)


# --- heads that are not of full rank ----------------------------------------------------------------------------------


def deficient(name):
    head = make_head(500, 40, mean=0.0)
    if name == "projected":
        head[:, 31:] = head[:, :9]
    elif name == "nearly":  # 1e-6 is far above float64's rounding of G, and below the cut at the square root of 1e-10
        head[:, 39] = head[:, 0] + 1e-6 * head[:, 39]
    elif name == "zero column":
        head[:, 5] = 0
    elif name == "few labels":
        head = head[:11]
    return head


RANKS = {"projected": 31, "nearly": 39, "zero column": 39, "few labels": 11}


@pytest.mark.parametrize("name", RANKS)
def test_rank_is_revealed_and_the_pseudo_inverse_holds(name):
    head = deficient(name)
    bases = SemanticBases.from_head(head)
    assert (bases.rank, bases.method) == (RANKS[name], "eigh")
    assert bases.condition < 1e10
    expected = torch.linalg.pinv(head, rtol=1e-5).T  # 1e-10 of the eigenvalues of G
    # eigh's error is that of a backward stable method on G, so G's condition amplifies it.
    bound = 16 * 2.0**-53 * bases.condition
    if name == "nearly":  # the cut direction is known to rounding / gap, and enters by its strength of 1e-6
        bound = 1e-5
    assert error(bases.vectors(slice(0, len(head))), expected) <= bound
    r = head[:7] @ torch.linalg.pinv(head, rtol=1e-5) @ head  # in the span of the rows
    assert error((r @ bases.tile(0, len(head)).T) @ bases.dual(), r) <= max(1e-9, bound)


def test_nearly_singular_but_factorised_is_cut(monkeypatch):
    """Condition 1e12 passes Cholesky in float64; the limit is what sends it to the eigenvectors."""
    head = make_head(300, 20, mean=0.0)
    head[:, 19] = head[:, 0] + 2e-6 * head[:, 19]
    monkeypatch.setattr(module, "CONDITION_LIMIT", 1e16)
    assert SemanticBases.from_head(head).method == "cholesky"
    monkeypatch.undo()
    bases = SemanticBases.from_head(head)
    assert (bases.method, bases.rank) == ("eigh", 19)


def test_zero_rows_stay_zero_and_are_reported():
    head = make_head(3000, 33, dtype=torch.float32)
    head[[0, 7, 2999]] = 0
    head[5] *= 1e-30  # its square is no float32, but it has a direction
    bases = SemanticBases.from_head(head)
    assert bases.zero_rows.tolist() == [0, 7, 2999]
    units = bases.matrix()
    assert not units[[0, 7, 2999]].any()
    assert not bases.dual()[[0, 7, 2999]].any()
    lengths = units.double().norm(dim=1)
    lengths[[0, 7, 2999]] = 1
    torch.testing.assert_close(lengths, torch.ones(3000).double(), rtol=0, atol=4e-7)  # rows rounded to float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_heads_are_refused(value):
    head = make_head(100, 8)
    head[3, 2] = value
    with pytest.raises(SemeError, match="head: has inf or NaN in it; repair the model"):
        SemanticBases.from_head(head)


@pytest.mark.parametrize("exponent", [-100, -70, 70, 100])
def test_very_large_and_small_heads_have_the_same_units(exponent):
    head, factor = make_head(300, 16, dtype=torch.float32), 2.0**exponent
    bases, wanted = SemanticBases.from_head(head * factor), SemanticBases.from_head(head)
    assert error(bases.matrix(), wanted.matrix()) < 1e-5  # one is of products in float64, the other in float32
    assert error(bases.dual(), wanted.dual()) < 1e-5
    assert error(bases.vectors(slice(0, 300)).double() * factor, wanted.vectors(slice(0, 300))) < 1e-5
    torch.testing.assert_close(bases.norms * factor, wanted.norms, rtol=1e-5, atol=0)


def test_bad_arguments():
    with pytest.raises(SemeError, match=r"head: shape \[5\] of torch.float32; expected 2 axes"):
        SemanticBases.from_head(torch.ones(5))
    with pytest.raises(SemeError, match=r"of torch\.int64; expected 2 axes of bfloat16"):
        SemanticBases.from_head(torch.ones(5, 5, dtype=torch.int64))
    with pytest.raises(SemeError, match="gain: 4 entries for a head of width 5"):
        SemanticBases.from_head(torch.ones(5, 5), torch.ones(4))
    with pytest.raises(SemeError, match="head: is zero, so it has no semantic bases"):
        SemanticBases.from_head(torch.zeros(5, 5))
    bases = SemanticBases.from_head(make_head(9, 3))
    for start, stop in ((-1, 3), (0, 10), (5, 4)):
        with pytest.raises(SemeError, match=f"labels {start} to {stop} of 9"):
            bases.tile(start, stop)


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_are_rows_of_the_whole(dtype):
    bases = SemanticBases.from_head(make_head(4200, 65, dtype=dtype), make_gain(65))
    whole, eps = bases.matrix(), torch.finfo(dtype).eps
    # A product may sum in another order for another number of rows; its terms are larger than the sum by up to the
    # condition of the head.
    bound = 4 * eps * bases.condition**0.5
    for start, stop in ((0, 4200), (0, 1), (1, 64), (4095, 4097), (4199, 4200), (77, 77)):
        part = bases.tile(start, stop)
        assert part.shape == (stop - start, 65)
        if stop > start:
            assert error(part, whole[start:stop]) <= bound
            assert error(bases.dual(start, stop), bases.dual()[start:stop]) <= bound
    some = torch.tensor([4199, 3, 3, 4096])
    assert error(bases.units(some), whole[some]) <= bound


def test_strides_and_offsets_of_the_head_do_not_matter():
    head = make_head(500, 31, dtype=torch.float32)
    expected = SemanticBases.from_head(head).matrix()
    wide = torch.full((501, 40), float("nan"))
    wide[1:, 5:36] = head
    assert error(SemanticBases.from_head(wide[1:, 5:36]).matrix(), expected) <= 1e-6  # as above, a little
    assert error(SemanticBases.from_head(head.T.contiguous().T).matrix(), expected) <= 1e-6


def test_same_head_gives_the_same_bytes():
    head = make_head(4200, 64, dtype=torch.float32)
    a, b = SemanticBases.from_head(head), SemanticBases.from_head(head.clone())
    assert torch.equal(a.inverse, b.inverse)
    assert torch.equal(a.matrix(), b.matrix())


# --- checkpoints ------------------------------------------------------------------------------------------------------


def logits_from_stream(folder):
    """Latent vectors of a real model right before its final norm, and the logits it makes of them, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    stream = {}
    name = next(n for n in ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm") if _has(model, n))
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: stream.update(h=args[0].detach()))
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(40)[None] % 90 + 4).logits
    return stream["h"][0].clone(), logits[0].clone(), model


def _has(model, name):
    return name in dict(model.named_modules())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma", "GPTNeoX", "gpt2"])
def test_folded_head_makes_the_logits_of_real_models(family, tied, tmp_path):
    """RMSNorm, RMSNorm of tied models, Gemma's gain of 1 + weight, LayerNorm with a bias."""
    options = {"vocab": 600, "hidden": 32, "dtype": torch.float32, "tokenizer": False}
    if family == "gpt2":
        folder = make.gpt2(tmp_path / "model", tie_word_embeddings=tied, **options)
    elif family == "Gemma":
        folder = make.decoder(family, tmp_path / "model", tied=tied, head_dim=8, **options)
    else:
        folder = make.decoder(family, tmp_path / "model", tied=tied, **options)
    h, logits, model = logits_from_stream(folder)
    if family in ("GPTNeoX", "gpt2"):
        h = h - h.mean(-1, keepdim=True)
        norm = model.gpt_neox.final_layer_norm if family == "GPTNeoX" else model.transformer.ln_f
        logits = logits - model.get_output_embeddings()(norm.bias).detach()
    h = h / h.pow(2).mean(-1, keepdim=True).sqrt()
    bases = SemanticBases.from_checkpoint(folder, cache=False)
    # eps of the norms (1e-5 or 1e-6 beside a mean square of 1e-3 or more), rounding of float32.
    assert error(h.float() @ bases.rows(slice(0, 600)).T, logits) < 5e-3
    cosine = torch.nn.functional.cosine_similarity(h.float() @ bases.rows(slice(0, 600)).T, logits.float(), dim=-1)
    assert float(cosine.min()) > 1 - 1e-6
    # So the logits give the vector back.
    assert error(logits.float() @ bases.vectors(slice(0, 600)), h) < 5e-3
    plain = SemanticBases.from_checkpoint(folder, cache=False, fold_norm=False)
    weight = model.get_output_embeddings().weight.detach().float()
    assert plain.head.gain is None
    assert torch.equal(plain.rows(slice(0, 600)), weight)
    assert error(h.float() @ plain.rows(slice(0, 600)).T, logits) > 0.02  # the gains differ from 1 by 0.02


@pytest.mark.parametrize("layout", ["single", "shards", "bin", "bin shards"])
def test_head_read_from_files_is_the_head_in_memory(layout, tmp_path):
    head, gain = make_head(4100, 16, dtype=torch.bfloat16), make_gain(16).float()
    tensors = {
        "model.embed_tokens.weight": head.flip(0).contiguous(),
        "model.norm.weight": gain,
        "lm_head.weight": head,
    }
    config = {"model_type": "llama", "hidden_size": 16, "vocab_size": 4100, "tie_word_embeddings": False}
    folder = write(tmp_path / "model", tensors, config, layout)
    stored = SemanticBases.from_checkpoint(folder, cache=False)
    memory = SemanticBases.from_head(head, gain)
    assert torch.equal(stored.inverse, memory.inverse)
    assert torch.equal(stored.matrix(), memory.matrix())
    for some in (torch.tensor([5, 4099, 6, 7, 0, 0]), torch.tensor([3]), slice(4, 4)):
        assert torch.equal(stored.rows(some), memory.rows(some))
    assert torch.equal(
        SemanticBases.from_checkpoint(str(folder), cache=False, fold_norm=False).rows(slice(0, 9)), head[:9].float()
    )


def test_labels_are_the_text_of_the_tokens(tmp_path):
    folder = make.llama(tmp_path / "model", vocab=110)
    labels = SemanticBases.from_checkpoint(folder).labels
    assert len(labels) == 110
    assert labels[:6] == ["<s>", "</s>", "<unk>", "<pad>", "a", "b"]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({"x": 0, "Ġy": 2}))
    assert SemanticBases.from_checkpoint(folder).labels[:4] == ["x", "<1>", "Ġy", "<3>"]
    assert SemanticBases.from_head(make_head(3, 2)).labels == ["<0>", "<1>", "<2>"]


@pytest.mark.parametrize(
    "data",
    [
        {"model": {"vocab": {"x": 0, "y": "1"}}},
        {"model": {"vocab": {"x": 0, "z": 2.0}}},
        {"model": {"vocab": {"x": 0, "u": True}}},
        {"model": {"vocab": {"x": 0}}, "added_tokens": [{"content": "b", "id": None}]},
    ],
    ids=["text", "float", "bool", "added"],
)
def test_ids_that_are_no_numbers_are_refused(data, tmp_path):
    folder = make.llama(tmp_path / "model", tokenizer=False)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    for use in (lambda folder: SemanticBases.from_checkpoint(folder).labels, lambda folder: by_name(folder, 4)):
        with pytest.raises(CheckpointError, match=r"tokenizer.json: token '.' has id .*; expected a whole number"):
            use(folder)


def test_checkpoints_without_a_head_that_can_be_used(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        SemanticBases.from_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        SemanticBases.from_checkpoint(tmp_path / "empty")
    config = {"model_type": "llama", "hidden_size": 16}
    lone = {"model.layers.0.mlp.up_proj.weight": torch.ones(3, 16), "model.norm.weight": torch.ones(16)}
    with pytest.raises(CheckpointError, match=r"headless.*no LM head or embedding"):
        SemanticBases.from_checkpoint(write(tmp_path / "headless", lone, config))
    bad = {
        **lone,
        "lm_head.weight": torch.ones(30, 16, dtype=torch.int8),
        "model.embed_tokens.weight": torch.ones(30, 16),
    }
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight: int8; bases need bfloat16"):
        SemanticBases.from_checkpoint(write(tmp_path / "integers", bad, config))
    bad["lm_head.weight"] = torch.full((30, 16), float("nan"))
    with pytest.raises(SemeError, match=r"model.safetensors: tensor lm_head.weight: has inf"):
        SemanticBases.from_checkpoint(write(tmp_path / "nan", bad, config))
    with pytest.raises(BackendError, match="device tpu"):
        SemanticBases.from_checkpoint(tmp_path / "nan", device="tpu")


# --- cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return make.llama(tmp_path / "model", vocab=700, tokenizer=False)


def test_second_time_comes_from_the_cache_with_the_same_bytes(folder, own_cache, monkeypatch):
    first = SemanticBases.from_checkpoint(folder)
    assert (first.source, first.stored.parent) == ("computed", own_cache)
    frame, norms = first.frame, first.norms
    assert sorted(p.name.split(".", 1)[1] for p in own_cache.iterdir()) == ["frame.safetensors", "inverse.safetensors"]

    def fail(*args):
        raise AssertionError("computed again")

    monkeypatch.setattr(module, "add_gram_", fail)
    second = SemanticBases.from_checkpoint(folder)
    assert second.source == "cache"
    assert (second.rank, second.condition, second.method) == (first.rank, first.condition, first.method)
    assert torch.equal(second.inverse, first.inverse)
    assert torch.equal(second.frame, frame)
    assert torch.equal(second.norms, norms)
    assert torch.equal(second.matrix(), first.matrix())


def test_key_is_the_content(folder, own_cache, tmp_path):
    """Not the path: a copy is found; a changed head, another gain and no gain are not."""
    SemanticBases.from_checkpoint(folder)
    tensors = read(folder)
    config = json.loads((folder / "config.json").read_text())
    changed = ("none", "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight")
    sources = []
    for number, name in enumerate(changed):
        other = write(tmp_path / str(number), {k: -x if k == name else x for k, x in tensors.items()}, config)
        sources.append(SemanticBases.from_checkpoint(other).source)
    sources.append(SemanticBases.from_checkpoint(folder, fold_norm=False).source)
    assert sources == ["cache", "cache", "computed", "computed", "computed"]
    assert len(list(own_cache.iterdir())) == 4


def corruptions():
    def flip(data, at):
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return {
        "truncated": lambda data: data[: len(data) // 2],
        "empty": lambda data: b"",
        "not a safetensors file": lambda data: b"hello" * 99,
        "one bit of the matrix": lambda data: flip(data, len(data) - 5),
        "the rank": lambda data: data.replace(b"[32, ", b"[31, "),
        "no checksum": lambda data: data.replace(b"checksum", b"checksun"),
    }


@pytest.mark.parametrize("name", corruptions())
def test_corrupted_cache_is_computed_again_and_replaced(name, folder, own_cache):
    first = SemanticBases.from_checkpoint(folder)
    good = first.stored.read_bytes()
    bad = corruptions()[name](good)
    assert bad != good
    first.stored.write_bytes(bad)
    second = SemanticBases.from_checkpoint(folder)
    assert second.source == "computed"
    assert torch.equal(second.inverse, first.inverse)
    assert first.stored.read_bytes() == good
    assert SemanticBases.from_checkpoint(folder).source == "cache"


def test_entry_of_another_key_is_not_taken(folder, own_cache):
    first = SemanticBases.from_checkpoint(folder)
    plain = SemanticBases.from_checkpoint(folder, fold_norm=False)
    plain.stored.write_bytes(first.stored.read_bytes())
    assert SemanticBases.from_checkpoint(folder, fold_norm=False).source == "computed"


def test_cache_that_cannot_be_written_is_done_without(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SEME_CACHE", str(tmp_path / "file"))
    bases = SemanticBases.from_checkpoint(folder)
    assert (bases.source, bases.stored) == ("computed", None)
    assert bases.frame.shape == (32, 32)
    assert bases.stored is None


def test_cache_can_be_left_alone(folder, own_cache):
    SemanticBases.from_checkpoint(folder, cache=False).frame  # noqa: B018
    assert not own_cache.exists()


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SEME_CACHE", str(tmp_path / "there"))
    assert cache.folder() == tmp_path / "there" / "bases"
    monkeypatch.delenv("SEME_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "seme" / "bases"
