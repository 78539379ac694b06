"""Transfer between latent spaces: its laws, labels that only a part of the vocabularies share, other widths."""

import json

import pytest
import torch

from seme import SemanticBases
from seme.errors import SemeError
from seme.semantics import MODES, shared_labels, transfer

from .. import models as make

V, D = 4200, 48  # two tiles of labels


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_head(v=V, d=D, seed=0):
    return (normal(v, d, seed=seed) + 0.5) * torch.linspace(1, 1.5, d)


def permutation(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


def all_pairs(v=V):
    return torch.arange(v)[:, None].expand(v, 2)


H = normal(20, D, seed=5)
HEAD = make_head()
BASES = SemanticBases.from_head(HEAD)
ROTATION = torch.linalg.qr(normal(D, D, seed=6))[0]
LINEAR = normal(D, D, seed=7) / D**0.5 + 2 * torch.eye(D)


@pytest.mark.parametrize("mode", MODES)
def test_is_the_sum_over_shared_labels(mode):
    """Written out in float64, for some labels in any order, of spaces of different widths."""
    other = make_head(1800, 31, seed=1)
    target = SemanticBases.from_head(other)
    ours, theirs = permutation(V, 1)[:4150], permutation(V, 2)[:4150] % 1800
    pairs = torch.stack([ours, theirs], 1)
    if mode == "logit":
        expected = H @ HEAD[ours].T @ torch.linalg.pinv(other[theirs]).T
    else:
        bases = torch.linalg.pinv(HEAD).T[ours], torch.linalg.pinv(other).T[theirs]
        unit = [x / x.norm(dim=1, keepdim=True) for x in bases]
        frame = unit[1] if mode == "cosine" else torch.linalg.pinv(unit[1]).T
        a = cosine(H[:, None], unit[0])
        expected = a @ frame if mode == "cosine" else a * H.norm(dim=1, keepdim=True) @ frame
    found = transfer(BASES, target, pairs, mode)
    assert (found.mode, found.labels, found.matrix.shape) == (mode, 4150, (D, 31))
    # Conditions of the heads here are below 1e3, float64 has 2^-53.
    torch.testing.assert_close(found(H), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", ["dual", "logit"])
@pytest.mark.parametrize("part", [False, True], ids=["all labels", "half of them"])
def test_a_space_and_itself(mode, part):
    pairs = all_pairs()[::2] if part else all_pairs()
    torch.testing.assert_close(transfer(BASES, BASES, pairs, mode).matrix, torch.eye(D).double(), rtol=0, atol=1e-11)


def test_rotation_is_exact_in_dual_and_logit_mode_and_close_in_cosine_mode():
    target = SemanticBases.from_head(HEAD @ ROTATION)
    for mode in ("dual", "logit"):
        found = transfer(BASES, target, all_pairs(), mode)(H)
        torch.testing.assert_close(found, H @ ROTATION, rtol=0, atol=1e-11)
    assert float(cosine(transfer(BASES, target, all_pairs(), "cosine")(H), H @ ROTATION).mean()) > 0.9


@pytest.mark.parametrize("part", [False, True], ids=["all labels", "half of them"])
def test_equal_logits_are_exact_in_logit_mode_only(part):
    """W' = W A^-T gives W' (A h) = W h: another space, the same model."""
    target = SemanticBases.from_head(HEAD @ torch.linalg.inv(LINEAR))
    pairs = all_pairs()[1::2] if part else all_pairs()
    torch.testing.assert_close(transfer(BASES, target, pairs, "logit")(H), H @ LINEAR.T, rtol=0, atol=1e-10)
    for mode in ("dual", "cosine"):
        assert float(cosine(transfer(BASES, target, pairs, mode)(H), H @ LINEAR.T).mean()) < 0.999


def test_wider_space_of_equal_logits_and_back():
    """A space of 80 dimensions whose head has the same logits; there and back is the vector."""
    wide = normal(D, 80, seed=8)
    target = SemanticBases.from_head(HEAD @ torch.linalg.pinv(wide).T)
    assert target.rank == D
    there, back = transfer(BASES, target, all_pairs()), transfer(target, BASES, all_pairs())
    assert there(H).shape == (20, 80)
    torch.testing.assert_close(back(there(H)), H, rtol=0, atol=1e-10)


def test_lengths():
    found = transfer(BASES, BASES, all_pairs(), "cosine")
    torch.testing.assert_close(found(3 * H), found(H))
    torch.testing.assert_close(found(H, restore_norm=True).norm(dim=1), H.norm(dim=1))
    exact = transfer(BASES, BASES, all_pairs(), "dual")
    torch.testing.assert_close(exact(3 * H), 3 * H)
    assert exact(H.to(torch.bfloat16)[None]).dtype == torch.bfloat16
    assert not exact(torch.zeros(2, D)).any()


def test_float32_heads():
    a = SemanticBases.from_head(HEAD.float())
    target = SemanticBases.from_head((HEAD @ ROTATION).float())
    # float32 rounding of the two heads' rows and bases, averaged over the labels.
    torch.testing.assert_close(transfer(a, target, all_pairs(), "dual")(H), H @ ROTATION, rtol=0, atol=1e-4)
    torch.testing.assert_close(transfer(a, target, all_pairs(), "logit")(H), H @ ROTATION, rtol=0, atol=1e-4)


# --- labels -----------------------------------------------------------------------------------------------------------


def vocabulary(folder, tokens):
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    return folder


def named(folder, tokens, seed):
    bases = SemanticBases.from_head(make_head(len(tokens) + 3, 4, seed))
    object.__setattr__(bases.head, "folder", vocabulary(folder, tokens))
    return bases


def test_labels_are_shared_by_what_they_stand_for(tmp_path):
    byte_level = ["<s>", "Ġthe", "cat", "Ċ", "Ã©", "A", "Ġ", "x", "Ġdog"]
    pieces = ["x", "▁the", "é", "<0x0A>", "<0x41>", "A", "</s>", "▁", "<s>", "the", "▁cow"]
    a, b = named(tmp_path / "a", byte_level, 0), named(tmp_path / "b", pieces, 1)
    # newline through its byte; "A" is a token and not the fallback for its byte
    expected = [("<s>", "<s>"), ("Ġthe", "▁the"), ("Ċ", "<0x0A>"), ("Ã©", "é"), ("A", "A"), ("Ġ", "▁"), ("x", "x")]
    found = [(byte_level[i], pieces[j]) for i, j in shared_labels(a, b).tolist()]
    assert found == expected
    assert transfer(a, b).labels == len(expected)
    assert shared_labels(a, a).tolist() == [[i, i] for i in range(9)]


def test_labels_by_name_and_by_pairs_are_the_same(tmp_path):
    a, b = named(tmp_path / "a", list("abcdefgh"), 0), named(tmp_path / "b", list("hgfedcba"), 1)
    by_name = transfer(a, b, ["a", "c", "e", "g", "h"])
    assert torch.equal(by_name.matrix, transfer(a, b, [(0, 7), (2, 5), (4, 3), (6, 1), (7, 0)]).matrix)


def test_order_of_labels_is_only_rounding():
    pairs = all_pairs()[permutation(V, 1)]
    for mode in MODES:
        a, b = transfer(BASES, BASES, pairs, mode), transfer(BASES, BASES, all_pairs(), mode)
        torch.testing.assert_close(a.matrix, b.matrix, rtol=0, atol=1e-11 * float(b.matrix.abs().max()))


def test_real_folders(tmp_path, monkeypatch):
    """Heads read from files, vocabularies from tokenizer.json, one of them a part of the other."""
    monkeypatch.setenv("SEME_CACHE", str(tmp_path / "cache"))
    folders = make.llama(tmp_path / "a", vocab=700, seed=1), make.llama(tmp_path / "b", vocab=600, seed=2)
    a, b = map(SemanticBases.from_checkpoint, folders)
    found = transfer(a, b)
    assert found.labels == 600
    expected = torch.linalg.lstsq(b.rows(slice(0, 600)).double(), a.rows(slice(0, 600)).double()).solution.T
    torch.testing.assert_close(found.matrix, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


def test_mistakes(tmp_path):
    a, b = named(tmp_path / "a", list("abc"), 0), named(tmp_path / "b", list("abd"), 1)
    for labels, message in (
        (["a", "c"], "token 'c' is not in the vocabulary of .*b"),
        ([(0, 0), (0, 6)], "0 to 6; head has 6 labels"),
        ([(-1, 0)], "-1 to -1; head has 6 labels"),
        ([], r"shape \[0\] of torch.float32; expected pairs of indices"),
        (torch.zeros(3, 2), r"shape \[3, 2\] of torch.float32; expected pairs"),
        (torch.zeros(3, 3, dtype=torch.int64), r"shape \[3, 3\] of torch.int64; expected pairs"),
    ):
        with pytest.raises(SemeError, match=message):
            transfer(a, b, labels)
    with pytest.raises(SemeError, match=r"a head without a folder: no tokenizer\.json or vocab"):
        transfer(BASES, a)
    with pytest.raises(SemeError, match="mode: 'cos'; expected"):
        transfer(a, b, mode="cos")
    with pytest.raises(SemeError, match=r"latent vectors: shape \[3\]; the source is of width 4"):
        transfer(a, b, [(0, 0)])(torch.ones(3))
