"""What ``seme bases`` measures: which vectors it takes from a checkpoint, and their figures."""

import pytest
import torch

from seme import SemanticBases
from seme.checkpoint import Checkpoint
from seme.roles import Role, TensorRole
from seme.semantics import round_trip
from seme.semantics.summary import SAMPLE, _columns, collect

from .. import models as make
from ..checkpoints import read, write


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEME_CACHE", str(tmp_path / "cache"))


def places(count):
    """Four runs of a quarter of the sample, evenly spread; all of them if there are fewer."""
    run = min(SAMPLE // 4, count)
    return [start + i for start in sorted({(count - run) * k // 3 for k in range(4)}) for i in range(run)]


@pytest.mark.parametrize("layout", ["single", "bin"])
def test_vectors_that_a_matrix_writes(layout, tmp_path):
    x = torch.randn(24, 301, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    stacked = torch.stack([x, -x])
    tensors = {"wide": x, "turned": x.T.contiguous(), "narrow": x[:, :7].contiguous(), "stacked": stacked}
    tensors["stacked turned"] = stacked.mT.contiguous()
    expected = x[:, places(301)].float().T
    with Checkpoint(write(tmp_path / "model", tensors, layout=layout)) as checkpoint:

        def columns(name, transposed=False, batch=0):
            return _columns(checkpoint, checkpoint.tensors[name], TensorRole(Role.WRITES, transposed, batch, "out"))

        assert torch.equal(columns("wide"), expected)
        assert torch.equal(columns("turned", transposed=True), expected)
        assert torch.equal(columns("stacked", batch=1), expected)
        assert torch.equal(columns("stacked turned", transposed=True, batch=1), expected)
        assert torch.equal(columns("narrow"), x[:, :7].float().T)


def test_figures_are_those_of_the_model_s_own_directions(tmp_path):
    folder = make.llama(tmp_path / "model", vocab=700, tokenizer=False)
    tensors, bases = read(folder), SemanticBases.from_checkpoint(folder)
    found = collect(folder)["round_trip"]

    def check(figures, vectors):
        trip = round_trip(vectors.float(), bases)
        # The same numbers in another order.
        assert figures == pytest.approx({"mean": float(trip.mean()), "min": float(trip.min())}, rel=1e-6)

    for i in range(2):
        parts = (f"model.layers.{i}.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj"))
        check(
            found["layers"][f"model.layers.{i}"],
            torch.cat([tensors[p][:, places(tensors[p].shape[1])].T for p in parts]),
        )
    rows = torch.linspace(0, 699, SAMPLE).long()
    check(found["embedding"], tensors["model.embed_tokens.weight"][rows])
    check(found["head"], bases.rows(rows))


def test_tied_and_transposed(tmp_path):
    """GPT-2: no embedding of its own beside the head, matrices stored as [in, out]."""
    folder = make.gpt2(tmp_path / "model", vocab=600, tokenizer=False)
    tensors, bases = read(folder), SemanticBases.from_checkpoint(folder)
    found = collect(folder)
    assert found["round_trip"]["embedding"] is None
    (layer,) = (name for name in found["round_trip"]["layers"] if name.endswith("h.1"))
    names = [next(n for n in tensors if n.endswith(f"h.1.{part}.c_proj.weight")) for part in ("attn", "mlp")]
    vectors = torch.cat([tensors[n][places(len(tensors[n]))] for n in names]).float()
    assert found["round_trip"]["layers"][layer]["min"] == pytest.approx(
        float(round_trip(vectors, bases).min()), rel=1e-6
    )
