"""Rule sequence on tiny models: its laws, its formula in float64, and transformers' own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from seme.checkpoint.reader import Checkpoint
from seme.errors import CheckpointError, ConfigError
from seme.semantics.sequence import Probes, Report, Settings, merge_sequence
from seme.semantics.skeleton import Skeleton, read
from tests import models

State = dict[str, torch.Tensor]
PROBES = Probes(count=2, batch=3, length=11)
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tied": True},  # biases
    "Gemma": {"head_dim": 8, "tied": True},  # scaled embedding, norms of gain 1 + g
    "Gemma2": {"head_dim": 8, "tied": True},  # norms behind attention and MLP
    "Phi3": {},  # fused attention and gate
    "GPTNeoX": {},  # parallel branches, a head with another name in the checkpoint
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "tied": True},  # learned positions
    "GPT2": {},  # transposed weights
}


def family(name: str, path: Path, **options: Any) -> Path:
    if name == "GPT2":
        return models.gpt2(path, tokenizer=False, hidden=32, **options)
    return models.decoder(name, path, tokenizer=False, dtype=torch.float32, **FAMILIES[name], **options)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """A base and two experts far enough from it to write different text."""
    folder = tmp_path_factory.mktemp("llamas")
    base = family("Llama", folder / "base", initializer_range=0.2)
    experts = [models.perturbed(base, folder / f"expert{i}", seed=i, scale=0.05) for i in (1, 2)]
    return [Checkpoint(p) for p in (base, *experts)]


def state(checkpoint: Checkpoint) -> State:
    return {n: read(checkpoint, n) for n in checkpoint.tensors}


def mean(checkpoints: Sequence[Checkpoint]) -> State:
    """A data-free answer that is easy to know."""
    states = [state(c) for c in checkpoints[1:]]
    return {n: sum(s[n] for s in states) / len(states) for n in states[0]}


def merged(
    checkpoints: Sequence[Checkpoint],
    free: State | None = None,
    weights: Sequence[float] | None = None,
    **settings: Any,
) -> tuple[State, Report]:
    free = mean(checkpoints) if free is None else free
    weights = [1.0] * (len(checkpoints) - 1) if weights is None else weights
    out: State = {}

    def emit(name: str, tensor: torch.Tensor) -> None:
        assert name not in out
        out[name] = tensor.clone()

    settings = {"probes": PROBES, **settings}
    report = merge_sequence(checkpoints, Settings(weight=lambda name: weights, **settings), emit, free.__getitem__)
    assert out.keys() == free.keys()
    return out, report


def distance(a: State, b: State) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.parametrize("name", FAMILIES)
def test_streams_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = family(name, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    skeleton = Skeleton(Checkpoint(path))
    ids = torch.randint(96, (3, 11), generator=torch.Generator().manual_seed(0))
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
        hook.remove()
        outside = skeleton.weights(skeleton.outside)
        skeleton.prepare(outside, skeleton.layer(0), ids)
        hidden = skeleton.enter(outside, ids)
        for i in range(len(skeleton.layers)):
            hidden = skeleton.run(i, skeleton.layer(i), hidden)
        found = skeleton.leave(outside, ids, hidden)
    # The same operations in the same order on the same numbers.
    assert torch.equal(found, seen[0].flatten(0, 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_expert_gives_that_expert_from_any_start(name: str, tmp_path: Path) -> None:
    base = family(name, tmp_path / "base")
    expert = Checkpoint(models.perturbed(base, tmp_path / "expert", seed=1, scale=0.02))
    checkpoints = [Checkpoint(base), expert]
    wanted = state(expert)
    # From the right answer nothing moves: every term is a difference from it.
    out, report = merged(checkpoints)
    assert distance(out, wanted) <= 1e-6  # products of equal matrices that round differently
    # From a wrong one the maps find their way, for the inputs that occur: enough tokens span nearly all of them.
    fitted = report.moved.keys()
    generator = torch.Generator().manual_seed(0)
    wrong = {n: w + 0.02 * torch.randn(w.shape, generator=generator) if n in fitted else w for n, w in wanted.items()}
    out, _ = merged(checkpoints, wrong, trust=1 - 1e-6, probes=Probes(count=2, batch=16, length=24))
    left, error = (sum(float((s[n] - wanted[n]).square().sum()) for n in fitted) for s in (out, wrong))
    assert left < 0.1 * error


def test_equal_experts_give_that_expert(llamas: list[Checkpoint]) -> None:
    out, _ = merged([llamas[0], llamas[1], llamas[1]])
    assert distance(out, state(llamas[1])) <= 1e-6  # float32 rounding of sums of 66 products


def test_without_trust_the_data_free_answer(llamas: list[Checkpoint]) -> None:
    free = mean(llamas)
    out, report = merged(llamas, free, trust=0.0)
    assert distance(out, free) == 0
    assert set(report.moved.values()) == {0.0}


def test_order_of_experts_does_not_matter(llamas: list[Checkpoint]) -> None:
    base, a, b = llamas
    one, _ = merged([base, a, b], weights=(1.0, 0.5))
    other, _ = merged([base, b, a], weights=(0.5, 1.0))
    free = mean(llamas)
    # Only the order of float32 sums differs; what was fitted is a thousand times larger.
    assert distance(one, other) < 1e-4
    assert distance(one, free) > 1e-2


def test_same_bytes_again_and_others_with_another_seed(llamas: list[Checkpoint]) -> None:
    first, _ = merged(llamas)
    torch.manual_seed(99)  # nobody else's random numbers are used
    again, _ = merged(llamas)
    other, _ = merged(llamas, probes=Probes(count=2, batch=3, length=11, seed=1))
    assert distance(first, again) == 0
    assert distance(first, other) > 0


def test_weight_zero_leaves_an_expert_out(llamas: list[Checkpoint]) -> None:
    free = state(llamas[1])
    out, _ = merged(llamas, free, weights=(1.0, 0.0))
    assert distance(out, free) <= 1e-6  # float32 rounding, as for one expert


def test_lambda_scales_the_task_vector(llamas: list[Checkpoint]) -> None:
    base, expert = state(llamas[0]), state(llamas[1])
    half = {n: base[n] + 0.5 * (expert[n] - base[n]) for n in base}
    out, report = merged(llamas[:2], half, scale=lambda name: 0.5)
    # The stream of the result is that of half the task vectors, so later maps move: only the first ones see X~ = X.
    first = [n for n in report.moved if "layers.0" in n and n.split(".")[-2] in ("q_proj", "k_proj", "v_proj")]
    assert len(first) == 3
    wrong = {n: half[n] + 0.01 if n in first else half[n] for n in half}
    embedded = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"
    exact = wrong | {n: expert[n] for n in embedded}
    out, _ = merged(
        llamas[:2], exact, scale=lambda name: 0.5, trust=1 - 1e-6, probes=Probes(count=4, batch=16, length=24)
    )
    for n in first:
        assert (out[n] - half[n]).norm() < 0.2 * (wrong[n] - half[n]).norm(), n


def test_formula_in_float64(llamas: list[Checkpoint]) -> None:
    """First group, first residual map and head, solved as the module's docstring writes them."""
    free = mean(llamas)
    out, _ = merged(llamas, free, weights=(1.0, 0.7), trust=0.8, rho=0.3)
    base, *experts = map(state, llamas)
    texts = [write(c) for c in llamas[1:]]
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    for module in (first, second, "lm_head"):
        name = f"{module}.weight"
        # What was fitted before runs with its result, the rest does not matter.
        x = [inputs(c.path, e, ids, module) for c, e, ids in zip(llamas[1:], experts, texts)]
        y = [inputs(c.path, out, ids, module) for c, ids in zip(llamas[1:], texts)]
        targets = [e[name].double() @ x[m] for m, e in enumerate(experts)]
        if module == second:
            for m, ids in enumerate(texts):
                layer = "model.layers.0"
                targets[m] += inputs(llamas[0].path, experts[m], ids, layer) - inputs(llamas[0].path, out, ids, layer)
        width = len(x[0])
        shares = [w * width / float(x[m].square().sum()) for m, w in enumerate((1.0, 0.7))]
        normal = sum(s * y[m] @ y[m].T for m, s in enumerate(shares))
        metric = torch.zeros_like(normal)
        for e, w in zip(experts, (1.0, 0.7)):
            t = (e[name] - base[name]).double()
            metric += w * (0.7 * width * t.T @ t / t.square().sum() + 0.3 * torch.eye(width, dtype=torch.float64))
        metric *= normal.diagonal().mean() / metric.diagonal().mean()
        start = free[name].double()
        error = sum(s * (targets[m] - start @ y[m]) @ y[m].T for m, s in enumerate(shares))
        wanted = start + 0.8 * error @ torch.linalg.inv(0.8 * normal + 0.2 * metric)
        # Activations in float32, against steps of about 1e-2.
        assert (out[name] - wanted).abs().max() < 1e-5, name
        assert (wanted - start).abs().max() > 1e-2


def test_biases_are_made_up_for(tmp_path: Path) -> None:
    """The result's bias is not an expert's, and the weight takes what it lacks: ``Y_m + b_m - b``, in float64."""
    base = models.decoder("Qwen2", tmp_path / "base", tokenizer=False, dtype=torch.float32, initializer_range=0.2)
    experts = [models.perturbed(base, tmp_path / f"expert{i}", seed=i, scale=0.2) for i in (1, 2)]
    checkpoints = [Checkpoint(p) for p in (base, *experts)]
    free = mean(checkpoints)
    out, _ = merged(checkpoints, free, trust=0.8, rho=1.0)  # so the metric is the identity
    module = "model.layers.0.self_attn.v_proj"
    name, bias = f"{module}.weight", f"{module}.bias"
    owned, start = [state(c) for c in checkpoints[1:]], free[name].double()
    normal, error, lacking = (torch.zeros(n, len(start[0]), dtype=torch.float64) for n in (32, len(start), len(start)))
    for c, e in zip(checkpoints[1:], owned):
        ids = write(c)
        x, y = inputs(c.path, e, ids, module), inputs(c.path, out, ids, module)
        share = len(x) / float(x.square().sum())
        normal += share * y @ y.T
        error += share * (e[name].double() @ x - start @ y) @ y.T
        lacking += share * torch.outer((e[bias] - free[bias]).double(), y.sum(1))
    inverse = torch.linalg.inv(0.8 * normal + 0.2 * normal.diagonal().mean() * torch.eye(32, dtype=torch.float64))
    wanted = start + 0.8 * (error + lacking) @ inverse
    # Activations in float32, against steps of about 1e-2.
    assert (out[name] - wanted).abs().max() < 1e-5
    assert (0.8 * lacking @ inverse).abs().max() > 1e-3


def write(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return Skeleton(checkpoint).write(6, 11, 1.0, torch.Generator().manual_seed(0))


def inputs(path: Path, weights: State, ids: torch.Tensor, module: str) -> torch.Tensor:
    """What a module gets in transformers' own forward pass, [width, tokens] in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    model.load_state_dict(weights)
    seen = []
    model.get_submodule(module).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    return seen[0].flatten(0, 1).T.double()


def test_text_is_what_the_model_would_say(llamas: list[Checkpoint]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llamas[1].path, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        cold = Skeleton(llamas[1]).write(5, 9, 1e-6, torch.Generator().manual_seed(0))
        likely = model(input_ids=cold).logits.argmax(-1)
    assert torch.equal(cold[:, 1:], likely[:, :-1])  # at temperature 0 it says the likeliest, with or without a cache
    warm = write(llamas[1])
    assert torch.equal(warm[:5, :1], write(llamas[2])[:5, :1])  # every expert starts from the same tokens
    assert not torch.equal(warm, write(llamas[2]))


@pytest.mark.parametrize(("name", "key"), [("GPT2", "n_positions"), ("OPT", "max_position_embeddings")])
def test_text_is_no_longer_than_the_positions(name: str, key: str, tmp_path: Path) -> None:
    base = Checkpoint(family(name, tmp_path / "base", **{key: 7}))
    _, report = merged([base, base], probes=Probes(count=1, batch=2, length=20))
    assert report.tokens == 2 * 7


def test_the_shortest_positions_of_all_models_count(tmp_path: Path) -> None:
    paths = [family("Llama", tmp_path / str(n), max_position_embeddings=n) for n in (16, 5, 9)]
    _, report = merged([Checkpoint(p) for p in paths], probes=Probes(count=1, batch=2, length=20))
    assert report.tokens == 2 * 5


def test_keeping_the_base_pulls_towards_it(llamas: list[Checkpoint]) -> None:
    base = state(llamas[0])
    alone, report = merged(llamas)
    kept, _ = merged(llamas, keep=100.0)
    far = [sum(float((s[n] - base[n]).norm()) for n in report.moved) for s in (alone, kept)]
    assert far[1] < 0.9 * far[0]


def test_residual_maps_are_found(llamas: list[Checkpoint], tmp_path: Path) -> None:
    def found(checkpoint: Checkpoint) -> list[tuple[tuple[str, ...], str | None]]:
        skeleton = Skeleton(checkpoint)
        ids = torch.randint(96, (3, 11))
        with torch.no_grad():
            outside = skeleton.weights(skeleton.outside)
            skeleton.prepare(outside, skeleton.layer(0), ids)
            groups = skeleton.groups(0, skeleton.layer(0), skeleton.enter(outside, ids))
        return [(g.names, g.adds_to) for g in groups]

    assert found(llamas[0]) == [
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None),
        (("self_attn.o_proj",), ""),
        (("mlp.gate_proj", "mlp.up_proj"), None),
        (("mlp.down_proj",), "post_attention_layernorm"),
    ]
    # Behind a norm or beside another branch a map's output is not what the stream gets.
    for name in ("Gemma2", "GPTNeoX"):
        assert {adds_to for _, adds_to in found(Checkpoint(family(name, tmp_path / name)))} == {None}


def test_bfloat16_checkpoints_and_spare_tensors(tmp_path: Path) -> None:
    base = models.llama(tmp_path / "base", tokenizer=False, shards=2)
    checkpoints = [Checkpoint(base), Checkpoint(models.perturbed(base, tmp_path / "expert", seed=1))]
    out, _ = merged(checkpoints)
    assert distance(out, state(checkpoints[1])) <= 1e-6  # as for float32
    tied = models.llama(tmp_path / "tied", tokenizer=False, tied=True, dtype=torch.float32)
    spare = {**state(Checkpoint(tied)), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    from safetensors.torch import save_file

    save_file(spare, tied / "model.safetensors", metadata={"format": "pt"})
    out, report = merged([Checkpoint(tied), Checkpoint(tied)])
    assert "model.embed_tokens.weight" in out
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in out
    assert len(report.moved) == 14


MIXTURE: dict[str, Any] = {"num_local_experts": 2}
REFUSED: list[tuple[Callable[[Path], Path], str]] = [
    (lambda p: models.decoder("Mixtral", p, tokenizer=False, **MIXTURE), "mixture of experts"),
    (lambda p: models.bert(p, tokenizer=False), "BertLMHeadModel wants a tensor"),
    (lambda p: models.raw(p, {"x": torch.ones(2)}, {"model_type": "t5"}), "causal model"),
    (lambda p: models.raw(p, {"x": torch.ones(2)}, {"model_type": "no such"}), "causal model"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=["mixture", "encoder", "encoder-decoder", "unknown"])
def test_what_cannot_run_is_refused(make: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(make(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="use rule: project") as error:
        merged([checkpoint, checkpoint])
    assert reason in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_models_that_do_not_fit_together(llamas: list[Checkpoint], tmp_path: Path) -> None:
    tied = Checkpoint(models.llama(tmp_path / "tied", tokenizer=False, tied=True))
    with pytest.raises(CheckpointError, match="tied weights"):
        merged([llamas[0], tied], free=mean(llamas))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"trust": 1.0}, "trust: 1.0"), ({"rho": 0.0}, "rho: 0.0"), ({"keep": -1.0}, "keep: -1.0")],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(weight=lambda name: [1.0], **settings)


def test_probes_and_weights_out_of_range(llamas: list[Checkpoint]) -> None:
    with pytest.raises(ConfigError, match=r"probes\.length: 0"):
        Probes(length=0)
    with pytest.raises(ConfigError, match=r"probes\.temperature: 0"):
        Probes(temperature=0.0)
    with pytest.raises(ConfigError, match=r"weight: \[1.0, -1.0\]"):
        merged(llamas, weights=(1.0, -1.0))
