"""docs/from-mergekit.md: what people run into with mergekit, and that it does not happen here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import seme
from seme import cli, native
from seme.checkpoint import hub
from seme.errors import CheckpointError, ConfigError

from . import models as make
from .checkpoints import read


def recipe(method: str, base: Path, *tuned: Path, **more: Any) -> dict[str, Any]:
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in tuned]
    return {"merge_method": method, "base_model": str(base), "models": models, **more}


def test_an_architecture_nobody_has_heard_of(tmp_path: Path) -> None:
    """Theme 1, and nothing is dropped: every tensor is merged, whatever its name."""
    generator = torch.Generator().manual_seed(0)
    names = ["thinker.pool.7.synapse", "thinker.pool.7.gate_b", "expert_stack", "x"]
    shapes = [(4, 6), (5,), (3, 4, 5), ()]
    states = [
        {n: torch.randn(s, generator=generator) for n, s in zip(names, shapes)} | {"steps": torch.tensor([3, 4])}
        for _ in range(3)
    ]
    config = {"architectures": ["ThinkerForWhatever"], "model_type": "thinker-9"}
    folders = [make.raw(tmp_path / f"m{i}", state, config) for i, state in enumerate(states)]
    seme.merge(recipe("task_arithmetic", *folders), tmp_path / "out")
    found = read(tmp_path / "out")
    assert found.keys() == states[0].keys()
    for name in names:
        wanted = states[0][name] + 0.5 * (states[1][name] - states[0][name]) + 0.5 * (states[2][name] - states[0][name])
        assert torch.allclose(found[name], wanted, rtol=0, atol=1e-6)  # a few roundings of float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["ThinkerForWhatever"]


def test_a_tensor_that_one_model_lacks_is_no_silent_loss(tmp_path: Path) -> None:
    base = make.llama(tmp_path / "base")
    tuned = make.perturbed(base, tmp_path / "tuned", seed=1)
    state = read(tuned)
    lost = state.pop("model.layers.1.mlp.up_proj.weight")
    short = make.raw(tmp_path / "short", state, json.loads((base / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=r"short: tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        seme.merge(recipe("task_arithmetic", base, short), tmp_path / "out")
    more = make.raw(tmp_path / "more", {**state, "model.layers.1.mlp.up_proj.weight": lost, "model.extra": lost})
    with pytest.raises(CheckpointError, match=r"tensor model\.extra is not in"):
        seme.merge(recipe("task_arithmetic", base, more), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vocabularies_that_differ(tmp_path: Path) -> None:
    """Theme 3: an error that names both shapes without ``tokenizer``; with it the union, each row the right token's."""
    transformers = pytest.importorskip("transformers")
    small = make.llama(tmp_path / "small", vocab=80)
    large = make.llama(tmp_path / "large", vocab=90, seed=1)
    with pytest.raises(CheckpointError, match=r"has shape \[90, 32\], \[80, 32\] in .*; vocabularies differ: add"):
        seme.merge(recipe("linear", small, large, parameters={"weight": 0.5}), tmp_path / "out")
    config = recipe("linear", small, large, parameters={"weight": 0.5}, tokenizer={"source": "union"})
    seme.merge(config, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert len(tokens) == model.config.vocab_size == 90
    stored = [read(folder)["model.embed_tokens.weight"].float() for folder in (small, large)]
    found = read(tmp_path / "out")["model.embed_tokens.weight"].float()
    for token, row in json.loads((large / "tokenizer.json").read_text())["model"]["vocab"].items():
        have = [s[row] if row < len(s) else stored[1][row] for s in stored]
        wanted = (have[0] + have[1]) / 2
        # One rounding to bfloat16.
        assert torch.allclose(found[tokens[token]], wanted, rtol=2**-8, atol=1e-6), token


@pytest.mark.skipif(native.why_not("_C") is not None, reason="the CPU kernels are not built")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Theme 4: four times the model, the same memory, in processes of their own."""
    program = (
        "import sys, json, seme\n"
        "seme.merge(json.loads(sys.argv[1]), sys.argv[2], threads=1, memory='8MiB')\n"
        "print(max(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')))\n"
    )
    peaks = []
    for i, rows in enumerate((2**12, 2**14)):
        generator = torch.Generator().manual_seed(0)
        folders = [
            make.raw(tmp_path / f"{i}-{k}", {"w": torch.randn(rows, 1024, generator=generator).bfloat16()})
            for k in range(3)
        ]
        config = json.dumps(recipe("ties", *folders, parameters={"density": 0.3}))
        done = subprocess.run(
            [sys.executable, "-c", program, config, str(tmp_path / f"out{i}")],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout))
    # 72 MB more to merge; the allocator may take a few pages more.
    assert peaks[1] - peaks[0] < 4_000, peaks


def test_no_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theme 6: thresholds are counted, also by the reference backend's merge."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sorted")

    base = make.llama(tmp_path / "base")
    tuned = [make.perturbed(base, tmp_path / f"t{i}", seed=i) for i in (1, 2)]
    for name in ("sort", "argsort", "topk", "kthvalue", "quantile"):
        monkeypatch.setattr(torch, name, refuse)
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for backend in ("auto", "torch"):
        config = recipe("ties", base, *tuned, parameters={"density": 0.3})
        seme.merge(config, tmp_path / backend, backend=backend)


def test_adapters_are_added_while_they_are_read(tmp_path: Path) -> None:
    """Theme 7: ``model+adapter``; the output folder is the only one that is written."""
    from safetensors.torch import save_file

    base = make.llama(tmp_path / "base", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(32, 4, generator=generator), torch.randn(4, 32, generator=generator)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    place = "model.layers.0.self_attn.q_proj"
    factors = {"lora_A": right, "lora_B": left}
    save_file(
        {f"base_model.model.{place}.{n}.weight": t for n, t in factors.items()}, adapter / "adapter_model.safetensors"
    )
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    before = {path.name for path in tmp_path.iterdir()}
    config = {"merge_method": "task_arithmetic", "base_model": str(base), "parameters": {"weight": 0.5}}
    config["models"] = [{"model": f"{base}+{adapter}"}]
    seme.merge(config, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before | {"out"}
    stored, found = read(base), read(tmp_path / "out")
    for name, tensor in stored.items():
        wanted = tensor + 0.5 * (2 * left @ right) if name == f"{place}.weight" else tensor
        # The product and two sums in float32, of numbers below 50.
        assert torch.allclose(found[name], wanted, rtol=1e-6, atol=1e-5), name


def test_vision_language_checkpoints(tmp_path: Path) -> None:
    """Theme 8: the tower and the projector are merged as well."""
    generator = torch.Generator().manual_seed(0)
    names = ("language_model.model.layers.0.mlp.up_proj.weight", "vision_tower.encoder.layers.0.fc1.weight")
    names += ("multi_modal_projector.linear_1.weight",)
    states = [{n: torch.randn(4, 4, generator=generator) for n in names} for _ in range(2)]
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": {}}
    folders = [make.raw(tmp_path / f"m{i}", s, config) for i, s in enumerate(states)]
    seme.merge(recipe("linear", *folders, parameters={"weight": 0.5}), tmp_path / "out")
    found = read(tmp_path / "out")
    for name in names:
        assert torch.allclose(found[name], (states[0][name] + states[1][name]) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"merge_method": "tiess"}, "merge_method: unknown method 'tiess'; did you mean 'ties'?"),
        ({"parameters": {"densty": 0.5}}, "parameters.densty: ties has no such parameter; did you mean 'density'?"),
        ({"out_dtyp": "bfloat16"}, "out_dtyp: unknown key; did you mean 'out_dtype'?"),
        ({"parameters": {"density": 7}}, "parameters.density: 7"),
        ({"dtype": "bf16"}, "dtype: 'bf16': expected one of"),
    ],
)
def test_a_typo_is_found_before_any_download(
    wrong: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theme 9."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("downloaded")

    monkeypatch.setattr(hub, "snapshot", refuse, raising=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    models = [{"model": f"org/model-{i}", "parameters": {"weight": 0.5}} for i in (1, 2)]
    config = {"merge_method": "ties", "base_model": "org/base", "models": models, **wrong}
    with pytest.raises(ConfigError) as e:
        seme.merge(config, tmp_path / "out")
    assert str(e.value).startswith(said)


def test_tied_heads_stay_tied(tmp_path: Path) -> None:
    """Theme 11: the merge of tied models has no head of its own, also where one of them stores a copy."""
    base = make.qwen2(tmp_path / "base")
    tuned = make.perturbed(base, tmp_path / "tuned", seed=1)
    state = read(tuned)
    assert "lm_head.weight" not in state
    copied = {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}
    stored = make.raw(tmp_path / "copied", copied, json.loads((base / "config.json").read_text()))
    seme.merge(recipe("linear", base, stored, parameters={"weight": 0.5}), tmp_path / "out")
    assert read(tmp_path / "out").keys() == state.keys()


@pytest.mark.parametrize(("dtype", "out_dtype", "written"), [
    (None, None, "bfloat16"),
    ("float32", "float16", "float16"),
    ("float16", None, "float16"),
])  # fmt: skip
def test_dtypes_are_as_asked_for(dtype: str | None, out_dtype: str | None, written: str, tmp_path: Path) -> None:
    """Theme 15: of every tensor, and of config.json; inputs may differ."""
    base = make.llama(tmp_path / "base", dtype=torch.bfloat16)
    config = recipe("linear", base, make.perturbed(base, tmp_path / "tuned", seed=1), parameters={"weight": 0.5})
    for key, value in (("dtype", dtype), ("out_dtype", out_dtype)):
        if value is not None:
            config[key] = value
    seme.merge(config, tmp_path / "out")
    assert {t.dtype for t in read(tmp_path / "out").values()} == {getattr(torch, written)}
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {told[key] for key in ("dtype", "torch_dtype") if key in told} == {written}


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_a_truncated_shard_is_named(keep: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make.llama(tmp_path / "base", shards=3)
    tuned = make.perturbed(base, tmp_path / "tuned", seed=1)
    shard = tuned / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(keep if keep >= 1 or keep == 0 else keep * len(data))])
    config = tmp_path / "recipe.yml"
    config.write_text(json.dumps(recipe("linear", base, tuned, parameters={"weight": 0.5})))
    assert cli.main(["merge", str(config), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(shard) in line
    assert not (tmp_path / "out").exists()
