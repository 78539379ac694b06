"""Matrix methods on whole checkpoints: streamed from disk, into a model that transformers loads, with a report."""

import json

import pytest
import torch

import seme
from seme.checkpoint import Checkpoint
from seme.cli import main
from seme.errors import CheckpointError, ConfigError
from seme.methods import get
from seme.roles import roles

from . import models as make
from .checkpoints import read

METHODS = ("seme", "tsv_m", "iso_c")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and two fine-tunes of a model wide enough for label bases: v = 96 = 6 d."""
    root = tmp_path_factory.mktemp("models")
    base = make.llama(root / "base", hidden=16, shards=2, dtype=torch.float32)
    return [base, *(make.perturbed(base, root / f"tuned-{i}", seed=i) for i in (1, 2))]


def merge(config, out, **options):
    """On one thread: on a busy machine two that wait for each other take far longer than these matrices."""
    return seme.merge(config, out, **{"threads": 1, **options})


def recipe(folders, method="seme", **more):
    return {
        "merge_method": method,
        "base_model": str(folders[0]),
        "models": [{"model": str(f)} for f in folders[1:]],
        **more,
    }


@pytest.mark.parametrize("method", METHODS)
def test_equals_the_merge_in_memory(folders, method, tmp_path):
    merge(recipe(folders, method), tmp_path / "out", threads=1)
    states = [read(f) for f in folders]
    config = json.loads((folders[0] / "config.json").read_text())
    wanted = seme.merge_state_dicts(states, method, base=0, config=config, threads=1)
    found = read(tmp_path / "out")
    assert found.keys() == wanted.keys() == states[0].keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
        assert not torch.equal(tensor, states[0][name]), name


@pytest.mark.parametrize("parameters", [{}, {"sigma": 0.5}, {"rule": "elect"}, {"axis": "latent"}])
def test_every_tensor_equals_its_reference(folders, parameters, tmp_path):
    merge(recipe(folders, parameters=parameters), tmp_path / "out")
    states, found = [read(f) for f in folders], read(tmp_path / "out")
    config = json.loads((folders[0] / "config.json").read_text())
    known = roles(config, {n: tuple(t.shape) for n, t in found.items()})
    bases = seme.SemanticBases.from_checkpoint(folders[0]).matrix().double()
    for name, tensor in found.items():
        inputs = [s[name] for s in states]
        wanted = get("seme").reference(inputs, base=0, weight=[1.0, 1.0], role=known[name], bases=bases, **parameters)
        off = (tensor - wanted).abs()
        size = float(torch.stack([t - inputs[0] for t in inputs[1:]]).abs().max())
        # float32 against float64: 1e-4 of the change; in elect a position at the threshold may fall either way.
        limit = 1e-4 * size + 2.0**-23 * float(inputs[0].abs().max())
        assert (off > limit).sum() <= (0.02 * off.numel() if parameters.get("rule") == "elect" else 0), name


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "bert"])
def test_families(family, tmp_path):
    """Transposed weights, tied heads and encoders; nothing is dropped, and transformers loads the result."""
    import transformers

    base = getattr(make, family)(tmp_path / "base")
    tuned = [make.perturbed(base, tmp_path / f"t{i}", seed=i) for i in (1, 2)]
    merge(recipe([base, *tuned]), tmp_path / "out")
    assert read(tmp_path / "out").keys() == read(base).keys()
    loader = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
    model, info = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_row_chunks_and_memory(folders, tmp_path):
    merge(recipe(folders), tmp_path / "a", memory="256MiB", threads=1)
    merge(recipe(folders), tmp_path / "b", memory="256KiB", threads=1)
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=1e-6), name  # changes of 0.03, to 1e-4 of them


def test_the_same_merge_gives_the_same_bytes(folders, tmp_path):
    for name in ("a", "b"):
        merge(recipe(folders), tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    for name in files:
        if name != "README.md":  # is titled with the folder's name
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_report_and_card(folders, tmp_path):
    merge(recipe(folders), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["experts"] == [str(f) for f in folders[1:]]
    assert set(report["tensors"]) == set(read(tmp_path / "out"))
    states = [read(f) for f in folders]
    for name, entry in report["tensors"].items():
        assert entry["role"]
        assert entry["rule"] == {"vocabulary": "drift", "norm": "mean"}.get(entry["role"], "project")
        if entry["rule"] == "project":
            norms = [float((s[name] - states[0][name]).norm()) for s in states[1:]]
            assert entry["norm"] == pytest.approx(norms, rel=1e-4)  # float32 sums
            assert all(0 < k < 1.5 for k in entry["kept"])
            assert 0 < entry["overlap"][0][1] <= 1
    assert [e["layer"] for e in report["layers"]] == ["model.layers.0", "model.layers.1"]
    tokens = [w["token"] for e in report["layers"] for x in e["experts"] for w in x["labels"]]
    assert len(tokens) == 2 * 2 * 8
    energies = [w["energy"] for w in report["layers"][0]["experts"][0]["labels"]]
    assert energies == sorted(energies, reverse=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## What was merged" in card
    assert "| model.layers.1 |" in card
    assert "kept of tuned-1" in card


def test_labels_are_those_the_expert_learned(tmp_path):
    """An expert whose layers moved along one label's basis is reported with that label."""
    base = make.llama(tmp_path / "base", hidden=16, layers=1, dtype=torch.float32)
    rows = seme.SemanticBases.from_checkpoint(base).matrix()
    tuned = []
    for i, label in enumerate((40, 70)):
        state = read(base)
        for name in ("q_proj", "k_proj", "v_proj"):
            key = f"model.layers.0.self_attn.{name}.weight"
            state[key] = state[key] + 0.1 * torch.ones(len(state[key]), 1) @ rows[label][None]
        folder = make.raw(tmp_path / f"tuned-{i}", state, json.loads((base / "config.json").read_text()), vocab=96)
        tuned.append(folder)
    merge(recipe([base, *tuned]), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    for expert, label in zip(report["layers"][0]["experts"], (40, 70)):
        assert expert["labels"][0]["id"] == label
        assert expert["distinct"][0]["id"] == label


def test_shares_of_a_layer_are_weighted_by_energy():
    """An expert that moved one matrix three times as far as another: nine parts of ten are the first one's share."""
    from seme.report.merge_report import _average

    large = {"norm": [3.0, 0.0], "kept": [1.0, None], "overlap": [[1.0, 0.5], [0.5, 1.0]]}
    small = {"norm": [1.0, 2.0], "kept": [0.0, 0.25], "overlap": [[1.0, 0.1], [0.1, 1.0]]}
    found = _average([large, small])
    assert found["kept"] == pytest.approx([0.9, 0.25])
    assert found["norm"] == pytest.approx([10**0.5, 2.0])
    assert found["overlap"] == [pytest.approx(row) for row in ([1.0, 0.3], [0.3, 1.0])]


def test_energies_do_not_depend_on_the_sign_between_tensors(folders, tmp_path):
    """gate and up that move alike, or one against the other, have the same energies but for the estimate's noise."""
    found = []
    for sign in (1, -1):
        config = json.loads((folders[0] / "config.json").read_text())
        tuned = []
        for i in (1, 2):
            state = read(folders[0])
            for layer in (0, 1):
                name = f"model.layers.{layer}.mlp.{{}}_proj.weight"
                delta = 0.1 * torch.randn(state[name.format("up")].shape, generator=torch.Generator().manual_seed(i))
                state[name.format("gate")] = state[name.format("gate")] + delta
                state[name.format("up")] = state[name.format("up")] + sign * delta
            tuned.append(make.raw(tmp_path / f"m{sign}{i}", state, config, vocab=96))
        merge(recipe([folders[0], *tuned]), tmp_path / f"out{sign}")
        report = json.loads((tmp_path / f"out{sign}" / "merge_report.json").read_text())
        found.append([e["labels"][0]["energy"] for x in report["layers"] for e in x["experts"]])
    # 32 probes estimate an energy to about a quarter; the same signs would make one of the two nearly zero.
    assert found[0] == pytest.approx(found[1], rel=0.5)


def test_dry_run_shows_roles_and_rules(folders, tmp_path, capsys):
    import yaml

    file = tmp_path / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe(folders, parameters={"axis": "latent"})))
    assert main(["merge", str(file), str(tmp_path / "out"), "--dry-run", "--verbose"]) == 0
    text = capsys.readouterr().out
    assert "model.layers.0.mlp.down_proj.weight [16, 32] float32->float32 writes (name): project on outputs" in text
    assert "model.embed_tokens.weight [96, 16] float32->float32 vocabulary (name): drift" in text
    assert not (tmp_path / "out").exists()


def test_roles_of_the_recipe(folders, tmp_path):
    base = read(folders[0])
    renamed = []
    for i, folder in enumerate(folders):
        state = {n.replace("mlp.up_proj", "mixer.hidden"): t for n, t in read(folder).items()}
        renamed.append(make.raw(tmp_path / f"m{i}", state, json.loads((folders[0] / "config.json").read_text())))
    override = [{"filter": r"mixer\.hidden", "role": "norm"}]
    merge(recipe(renamed, roles=override), tmp_path / "out")
    name = "model.layers.0.mixer.hidden.weight"
    found, states = read(tmp_path / "out")[name], [read(f)[name] for f in renamed]
    assert torch.allclose(found, (states[1] + states[2]) / 2, atol=1e-6)  # a mean of two float32 numbers
    assert base.keys() != read(tmp_path / "out").keys()


def test_the_head_named_in_the_recipe_gives_the_bases(folders, tmp_path):
    """Embedding and head with each other's names; the merge is that of the models with their own names."""
    swap = {"model.embed_tokens.weight": "lm_head.weight", "lm_head.weight": "model.embed_tokens.weight"}
    swapped = []
    for i, folder in enumerate(folders):
        state = {swap.get(n, n): t for n, t in read(folder).items()}
        swapped.append(make.raw(tmp_path / f"m{i}", state, json.loads((folders[0] / "config.json").read_text())))
    elect = {"rule": "elect"}
    override = [{"filter": "embed_tokens", "role": "head"}, {"filter": "lm_head", "role": "vocabulary"}]
    merge(recipe(swapped, roles=override, parameters=elect), tmp_path / "named")
    merge(recipe(folders, parameters=elect), tmp_path / "plain")
    named, plain = read(tmp_path / "named"), read(tmp_path / "plain")
    for name, tensor in plain.items():
        assert torch.equal(named[swap.get(name, name)], tensor), name


def test_mistakes_are_found_before_bytes(folders, tmp_path):
    headless = [
        make.raw(tmp_path / f"h{i}", {"layers.0.fc.weight": torch.randn(8, 4)}, {"hidden_size": 4}) for i in range(3)
    ]
    with pytest.raises(CheckpointError, match="head"):
        merge(recipe(headless, parameters={"rule": "elect"}), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"parameters.rho: 2.0; expected a number from 0 to 1"):
        merge(recipe(folders, parameters={"rho": [0.1, 2]}), tmp_path / "out")
    with pytest.raises(ConfigError, match="nonfinite: keep: seme would spread a NaN over whole matrices; use zero"):
        merge(recipe(folders), tmp_path / "out", nonfinite="keep")
    with pytest.raises(ConfigError, match="base_model: missing"):
        merge({"merge_method": "seme", "models": [{"model": str(folders[1])}]}, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"roles\[0\].role: 'reeds': no such role; did you mean 'reads'"):
        merge(recipe(folders, roles=[{"filter": "x", "role": "reeds"}]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_nonfinite_inputs(folders, tmp_path):
    state = read(folders[1])
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][3, 2:4] = torch.tensor([float("nan"), float("inf")])
    bad = make.raw(tmp_path / "bad", state, json.loads((folders[0] / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=rf"{name}: 2 or more of 512 elements are inf or NaN"):
        merge(recipe([folders[0], bad, folders[2]]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(recipe([folders[0], bad, folders[2]]), tmp_path / "out", nonfinite="zero")
    assert all(torch.isfinite(t).all() for t in read(tmp_path / "out").values())


def test_only_some_rows_and_matrices_are_held(tmp_path, monkeypatch):
    """No read is larger than the workspace; the largest tensor of the model is."""
    base = make.raw(tmp_path / "base", {"layers.0.up_proj.weight": torch.randn(4096, 64)}, {"hidden_size": 64})
    tuned = [make.perturbed(base, tmp_path / f"t{i}", seed=i) for i in range(2)]
    sizes = []
    read_into = Checkpoint.read_into

    def spy(self, tensor, start, buffer):
        sizes.append(len(buffer))
        read_into(self, tensor, start, buffer)

    monkeypatch.setattr(Checkpoint, "read_into", spy)
    merge(recipe([base, *tuned]), tmp_path / "out", memory="256KiB")
    assert max(sizes) <= 64 * 1024 < 4096 * 64 * 4


def test_sequence(folders, tmp_path):
    """Streamed through the engine: deterministic by seed, everything written, and it differs from project."""
    parameters = {"rule": "sequence", "probes": 1}
    merge(recipe(folders, parameters=parameters), tmp_path / "a")
    merge(recipe(folders, parameters=parameters), tmp_path / "b")
    merge(recipe(folders, parameters={**parameters, "trust": 0}), tmp_path / "free")
    merge(recipe(folders), tmp_path / "project")
    a, b, free, project = (read(tmp_path / n) for n in ("a", "b", "free", "project"))
    assert a.keys() == read(folders[0]).keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.allclose(free[n], project[n], atol=1e-6) for n in a)  # the order in which tensors are taken
    assert not torch.allclose(a["model.layers.1.mlp.up_proj.weight"], project["model.layers.1.mlp.up_proj.weight"])
    report = json.loads((tmp_path / "a" / "merge_report.json").read_text())
    assert report["sequence"]["tokens"] == 16 * 64  # of 128 the positions that the models have
    assert report["sequence"]["moved"]["model.layers.1.mlp.up_proj.weight"] > 0


@pytest.mark.parametrize("which", [0, 2])
def test_sequence_and_nonfinite_inputs(folders, which, tmp_path, monkeypatch):
    """An error names the tensor before a model has written anything; with zero, zeros are merged."""
    name = "model.layers.1.mlp.up_proj.weight"
    state, zeros = read(folders[which]), read(folders[which])
    state[name][3, 2:4] = torch.tensor([float("nan"), float("inf")])
    zeros[name][3, 2:4] = 0
    config = json.loads((folders[0] / "config.json").read_text())
    bad, repaired = make.raw(tmp_path / "bad", state, config), make.raw(tmp_path / "repaired", zeros, config)
    parameters = {"rule": "sequence", "probes": 1}

    def with_(folder):
        return recipe([*folders[:which], folder, *folders[which + 1 :]], parameters=parameters)

    merge(with_(bad), tmp_path / "out", nonfinite="zero")
    merge(with_(repaired), tmp_path / "wanted")
    found, wanted = read(tmp_path / "out"), read(tmp_path / "wanted")
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    monkeypatch.setattr("seme.semantics.skeleton.Skeleton.write", lambda *args: pytest.fail("text was written"))
    with pytest.raises(CheckpointError, match=rf"bad/model.safetensors: tensor {name}: 2 or more of 512 elements"):
        merge(with_(bad), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_the_dry_run_counts_the_model_that_writes(dtype, size, tmp_path, capsys):
    """Rule sequence takes one model more than project, and keys and values: 2 layers, 2 of 4 heads of width 8."""
    folder = make.llama(tmp_path / "base", dtype=dtype)
    peaks = {}
    for rule in ("project", "sequence"):
        file = tmp_path / f"{rule}.yml"
        file.write_text(json.dumps(recipe([folder, folder], parameters={"rule": rule, "probes": 3})))
        assert main(["merge", str(file), str(tmp_path / "out"), "--dry-run", "--json"]) == 0
        peaks[rule] = json.loads(capsys.readouterr().out)["peak_memory_bytes"]
    model = sum(t.numel() for t in read(folder).values())
    counted = peaks["sequence"] - peaks["project"] - size * (model + 2 * 2 * (3 * 16) * 128 * 2 * 8)
    assert 0 <= counted < 1 << 16  # the matrices of one tensor differ a little


def test_sequence_is_for_whole_models(folders, tmp_path):
    mixed = {"rule": [{"filter": "mlp", "value": "sequence"}, {"value": "project"}]}
    with pytest.raises(ConfigError, match=r"parameters.rule: rule sequence needs one value .* found project, sequence"):
        merge(recipe(folders, parameters=mixed), tmp_path / "out")
    states = [read(f) for f in folders]
    with pytest.raises(ConfigError, match=r"parameters.rule: sequence runs the models; merge their folders"):
        seme.merge_state_dicts(states, "seme", base=0, parameters={"rule": "sequence"})
    assert not (tmp_path / "out").exists()
