"""seme against mergekit 0.1.5: the same recipes on the same checkpoints, element by element.

What may differ, and why, is in :func:`.compare.allowance` and :func:`.compare.undecided`; all else is equal to the bit.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch

import seme
from seme import plan as planning
from seme.checkpoint.tokenizer import MODEL_FILES, TOKENIZER_FILES
from seme.config import load
from seme.errors import CheckpointError, ConfigError

from ..checkpoints import read, write
from .compare import SPHERES, Distance, allowance, distance, inputs, kept_count, undecided
from .families import FAMILIES, MEMBERS
from .oracle import Oracle, OracleError
from .recipes import PRECISIONS, RECIPES

Models = Callable[[str, str, str], Path]
Record = Callable[[str, str, Distance], None]


@dataclass(frozen=True)
class Case:
    """One recipe on one family; ``stored`` is the dtype of the checkpoints, by member or of all."""

    method: str
    recipe: str
    family: str
    precision: str
    stored: str | Mapping[str, str] = "bfloat16"

    def __str__(self) -> str:
        stored = self.stored if isinstance(self.stored, str) else "mixed"
        return f"{self.method}-{self.recipe}-{self.family}-{stored}-{self.precision}".replace(", ", "+")

    def text(self, models: Models) -> str:
        dtypes = {m: self.stored if isinstance(self.stored, str) else self.stored[m] for m in MEMBERS}
        words = dict(FAMILIES[self.family].words)
        text = RECIPES[self.method][self.recipe]
        words.update({m: str(models(self.family, m, dtypes[m])) for m in MEMBERS if f"${m}" in text})
        text = Template(text).substitute(words) + PRECISIONS[self.precision]
        # seme's own default is a divergence that is not rounded at every step.
        rounded = self.method == "arcee_fusion" and self.precision.startswith(("bfloat16", "float16"))
        return text + "compat: mergekit\n" if rounded else text


PROMOTED = ("arcee_fusion", "ramplus_tl")
"""Methods in which mergekit multiplies by float32 tensors: of 16-bit models without ``out_dtype`` it writes float32."""
MIXED = {"base": "float32", "a": "bfloat16", "b": "float16", "c": "bfloat16"}
EVERY = [(method, recipe) for method, recipes in RECIPES.items() for recipe in recipes]
FEW = [(method, recipe) for method, recipe in EVERY if recipe in (next(iter(RECIPES[method])), "filters")]
RESCALED = [(method, recipe) for method, recipe in EVERY if recipe == "rescale"]
OTHERS = [family for family in FAMILIES if family not in ("llama", "wide")]
MAIN_PRECISIONS, RARE_PRECISIONS = list(PRECISIONS)[:4], list(PRECISIONS)[4:]


def cases() -> list[Case]:
    # Two of the four precisions for each recipe, so that every method meets all of them.
    found = [Case(m, r, "llama", MAIN_PRECISIONS[(i + k) % 4]) for i, (m, r) in enumerate(EVERY) for k in (0, 1)]
    # Every method meets every other architecture, and every recipe one or two of them; precisions take turns.
    for i, (method, recipes) in enumerate(RECIPES.items()):
        for j in range(max(len(OTHERS), 2 * len(recipes))):
            recipe, family = list(recipes)[j % len(recipes)], OTHERS[(j + j // len(OTHERS)) % len(OTHERS)]
            found.append(Case(method, recipe, family, MAIN_PRECISIONS[(i + j + j // 4) % 4]))
    found += [Case(m, r, "llama", MAIN_PRECISIONS[(i + k) % 4], MIXED) for i, (m, r) in enumerate(FEW) for k in (0, 2)]
    for i, (m, r) in enumerate(FEW):
        stored = ("float16", "float32") if i % 4 < 2 else ("float32", "float16")
        found += [Case(m, r, "llama", p, s) for s, p in zip(stored, ("float32, bfloat16", "stored"))]
    found += [Case(m, r, "qwen2", p) for (m, r), p in itertools.product([*FEW, *RESCALED], RARE_PRECISIONS)]
    # Tensors of many chunks, which hardly meet the precision: one for each method, in turns.
    found += [Case(m, next(iter(RECIPES[m])), "wide", ("float32", "stored")[i % 2]) for i, m in enumerate(RECIPES)]
    return found


DEFAULT_CASES = [
    Case(method, recipe, "gpt2", precision)
    for (method, recipe), precision in itertools.product(
        [*FEW, ("linear", "gradients"), *RESCALED], ("float32, bfloat16", "float32", "stored")
    )
]


def run_both(text: str, oracle: Oracle, folder: Path, tokenizer: bool = False, **options: Any) -> tuple[Path, Path]:
    """The outputs of seme and of mergekit, which run at the same time."""
    theirs = folder / "mergekit"
    with oracle.merging(text, theirs, copy_tokenizer=tokenizer):
        ours = seme.merge(text, folder / "seme", **options).path
    return ours, theirs


def config_dtype(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: str | None = config.get("dtype") or config.get("torch_dtype")
    return found


def check(text: str, ours: Path, theirs: Path, oracle: Oracle, record: Record, precision: str) -> None:
    """Assert that two outputs of a recipe hold the same tensors, and the same values as far as is promised."""
    plan = planning.make(load(text))
    plan.close()
    mine, other = read(ours), read(theirs)
    assert set(mine) == set(other) == {t.name for t in plan.tensors}
    total = Distance()
    wrong = []
    for tensor in plan.tensors:
        a, b = mine[tensor.name], other[tensor.name]
        if plan.method.name in PROMOTED and b.dtype == torch.float32 and tensor.spec.dtype.itemsize == 2:
            b = b.to(a.dtype)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), tensor.name
        stored = inputs(tensor)
        ties = None if tensor.copy else undecided(plan.method, tensor, stored)
        if tensor.copy or torch.equal(a, b):
            found = distance(a, b, ties=ties)
        else:
            found = distance(a, b, allowance(plan.method, tensor, stored, oracle.fused), ties)
        total.add(found)
        if found.outside:
            wrong.append(f"{tensor.name}: {found}")
    record(plan.method.name + (", fused" if oracle.fused else ""), precision, total)
    assert not wrong, "\n".join([f"{len(wrong)} tensors differ, of which:", *wrong[:5]])


@pytest.mark.parametrize("case", cases(), ids=str)
def test_the_same_recipe_gives_the_same_values(
    case: Case, model: Models, oracle: Oracle, record: Record, tmp_path: Path
) -> None:
    text = case.text(model)
    ours, theirs = run_both(text, oracle, tmp_path, threads=2, memory="8MiB")
    check(text, ours, theirs, oracle, record, case.precision)
    # config.json names the dtype of the tensors. mergekit leaves the donor's as it is if the recipe gives none, which
    # is right only if all models are stored alike.
    written = {str(t.dtype).removeprefix("torch.") for t in read(ours).values() if t.is_floating_point()}
    assert written == {config_dtype(ours)}
    if case.method not in PROMOTED and (case.precision != "stored" or isinstance(case.stored, str)):
        assert config_dtype(ours) == config_dtype(theirs)


@pytest.mark.parametrize("case", DEFAULT_CASES, ids=str)
def test_mergekit_on_the_best_kernels_of_the_machine(
    case: Case, model: Models, default_oracle: Oracle, record: Record, tmp_path: Path
) -> None:
    text = case.text(model)
    ours, theirs = run_both(text, default_oracle, tmp_path)
    check(text, ours, theirs, default_oracle, record, case.precision)


@pytest.mark.parametrize("method", RECIPES)
def test_without_dtype_seme_computes_as_mergekit_does_in_float32(
    method: str, model: Models, oracle: Oracle, record: Record, tmp_path: Path
) -> None:
    case = Case(method, next(iter(RECIPES[method])), "llama", "float32, bfloat16")
    text = case.text(model)
    ours = seme.merge(text.replace(PRECISIONS[case.precision], ""), tmp_path / "seme").path
    theirs = oracle.merge(text, tmp_path / "mergekit", copy_tokenizer=False)
    check(text, ours, theirs, oracle, record, case.precision)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", ["slerp", *SPHERES, "sce"])
def test_where_both_differ_seme_is_no_farther_from_the_formula(
    method: str, precision: str, model: Models, oracle: Oracle, tmp_path: Path
) -> None:
    """Distances of many ulps are those of elements whose terms nearly cancel, and of sums that mergekit rounds."""
    square = {"seme": 0.0, "mergekit": 0.0}
    for recipe in list(RECIPES[method])[:2]:
        text = Case(method, recipe, "llama", precision).text(model)
        (tmp_path / recipe).mkdir()
        ours, theirs = (read(folder) for folder in run_both(text, oracle, tmp_path / recipe))
        plan = planning.make(load(text))
        plan.close()
        for tensor in plan.tensors:
            stored = inputs(tensor)
            held = [t.to(tensor.group.compute_dtype.to_torch()).double() for t in stored]
            formula = plan.method.reference(held, base=tensor.group.base, **tensor.arguments)
            ties = undecided(plan.method, tensor, stored)
            for name, tensors in (("seme", ours), ("mergekit", theirs)):
                error = tensors[tensor.name].double() - formula
                error = error if ties is None else error[~ties.reshape(error.shape)]
                square[name] += float(error.square().sum())
    # Where both round the same terms once or twice (slerp, and sce in bfloat16) chance decides, by a few percent.
    assert square["seme"] <= 1.05 * square["mergekit"], square


# What a trim keeps, made visible: one expert of weight 1, so that an element is either moved or the base's.


@pytest.mark.parametrize("density", [1e-4, 0.3, 0.9])
@pytest.mark.parametrize("member", ["a", "b", "c"])
@pytest.mark.parametrize("precision", ["float32", "stored"])
def test_both_trims_keep_exactly_k_and_differ_in_ties_only(
    precision: str, member: str, density: float, model: Models, default_oracle: Oracle, record: Record, tmp_path: Path
) -> None:
    # lambda carries every kept element away from the base also where base + delta rounds to the base.
    text = Template(
        "merge_method: ties\nmodels: [{model: $expert, parameters: {weight: 1}}]\nbase_model: $base\n"
        f"parameters: {{density: {density}, lambda: 4096}}\n{PRECISIONS[precision]}"
    ).substitute(base=model("qwen2", "base", "bfloat16"), expert=model("qwen2", member, "bfloat16"))
    ours, theirs = run_both(text, default_oracle, tmp_path)
    check(text, ours, theirs, default_oracle, record, precision)
    mine, other = read(ours), read(theirs)
    plan = planning.make(load(text))
    plan.close()
    for tensor in plan.tensors:
        expert, base = (t.to(tensor.group.compute_dtype.to_torch()) for t in inputs(tensor))
        magnitude = (expert - base).abs()
        k = kept_count(density, base.numel())
        visible = min(k, int((magnitude > 0).sum()))
        for merged in (mine, other):
            kept = merged[tensor.name] != base
            assert int(kept.sum()) == visible, tensor.name
            assert not (kept & (magnitude == 0)).any()
            # Every element that is kept is at least as large as every one that is not.
            if kept.any() and not kept.all():
                assert magnitude[kept].min() >= magnitude[~kept].max(), tensor.name


def test_the_cases_reach_what_they_are_for(model: Models) -> None:
    """Ties at the threshold, both branches of slerp, zero vectors, gradients between anchors."""
    plan = planning.make(load(Case("ties", "scalars", "llama", "stored").text(model)))
    plan.close()
    undecided_ = [undecided(plan.method, t, inputs(t)) for t in plan.tensors]
    assert sum(int(mask.sum()) for mask in undecided_ if mask is not None) > 100
    plan = planning.make(load(Case("slerp", "classic", "gpt2", "stored").text(model)))
    plan.close()
    cosines = []
    for tensor in plan.tensors:
        v0, v1 = (t.double().reshape(-1) for t in inputs(tensor))
        norms = float(v0.norm() * v1.norm())
        cosines.append(float(v0 @ v1) / norms if norms else 0.0)
    assert 0.0 in cosines, "no zero vector"
    assert any(0 < c < 0.9 for c in cosines)
    assert max(cosines) > 0.9995
    assert len({t.arguments["t"] for t in plan.tensors}) >= 5


# What else a merged model has.


def write_with(folder: Path, source: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
    """A copy of a model with more tensors and another config."""
    stored = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return write(folder, {**read(source), **tensors}, {**stored, **config})


def test_a_stored_copy_of_a_tied_head_is_left_out_and_nothing_is_lost(
    model: Models, oracle: Oracle, record: Record, tmp_path: Path
) -> None:
    base, a = model("qwen2", "base", "bfloat16"), model("qwen2", "a", "bfloat16")
    copied = write_with(tmp_path / "a", a, {"lm_head.weight": read(a)["model.embed_tokens.weight"]})
    text = (
        f"merge_method: task_arithmetic\nmodels: [{{model: {copied}, parameters: {{weight: 0.3}}}}]\n"
        f"base_model: {base}\ndtype: float32\nout_dtype: bfloat16\n"
    )
    ours, theirs = run_both(text, oracle, tmp_path)
    # mergekit writes the head as well, and it is the embedding.
    other = read(theirs)
    assert torch.equal(other["lm_head.weight"], other["model.embed_tokens.weight"])
    mine = read(ours)
    assert set(other) - set(mine) == {"lm_head.weight"}
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert json.loads((ours / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is True


def test_an_untied_base_takes_the_embedding_of_a_tied_model_as_its_head(
    model: Models, oracle: Oracle, record: Record, tmp_path: Path
) -> None:
    base, a = model("qwen2", "base", "bfloat16"), model("qwen2", "a", "bfloat16")
    head = read(base)["model.embed_tokens.weight"].flip(0)
    untied = write_with(tmp_path / "base", base, {"lm_head.weight": head}, tie_word_embeddings=False)
    text = (
        f"merge_method: slerp\nmodels: [{{model: {untied}}}, {{model: {a}}}]\nbase_model: {untied}\n"
        "parameters: {t: 0.4}\ndtype: bfloat16\n"
    )
    ours, theirs = run_both(text, oracle, tmp_path)
    assert "lm_head.weight" in read(ours)
    check(text, ours, theirs, oracle, record, "bfloat16")


@pytest.mark.parametrize("donor", ["base", "a"])
def test_tokenizer_and_config_come_from_the_base_model(
    donor: str, model: Models, oracle: Oracle, record: Record, tmp_path: Path
) -> None:
    base, other = model("llama", donor, "bfloat16"), model("llama", "b", "bfloat16")
    text = (
        f"merge_method: slerp\nmodels: [{{model: {other}}}, {{model: {base}}}]\nbase_model: {base}\n"
        "parameters: {t: 0.5}\nout_dtype: float16\ndtype: float32\n"
    )
    ours, theirs = run_both(text, oracle, tmp_path, tokenizer=True)
    names = [n for n in (*TOKENIZER_FILES, *MODEL_FILES) if (theirs / n).exists()]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= set(names)
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes() == (base / name).read_bytes(), name
    mine, reference = (json.loads((f / "config.json").read_text(encoding="utf-8")) for f in (ours, theirs))
    stored = json.loads((base / "config.json").read_text(encoding="utf-8"))
    # mergekit writes it through transformers, which adds its defaults; what the model says is in both.
    assert {k: mine[k] for k in stored} == {k: reference[k] for k in stored} == {**stored, "dtype": "float16"}
    check(text, ours, theirs, oracle, record, "float32, float16")


def test_tokenizer_source_base_with_one_vocabulary(
    model: Models, oracle: Oracle, record: Record, tmp_path: Path
) -> None:
    text = Case("task_arithmetic", "scalars", "llama", "float32, bfloat16").text(model) + "tokenizer_source: base\n"
    ours, theirs = run_both(text, oracle, tmp_path, tokenizer=True)
    check(text, ours, theirs, oracle, record, "float32, bfloat16")
    vocabularies = [json.loads((f / "tokenizer.json").read_text())["model"]["vocab"] for f in (ours, theirs)]
    assert vocabularies[0] == vocabularies[1]


def test_a_tensor_that_mergekit_drops_is_merged(model: Models, oracle: Oracle, tmp_path: Path) -> None:
    """mergekit writes what its list of the architecture has; here a q_norm, as newer members of the family have."""
    name = "model.layers.0.self_attn.q_norm.weight"
    folders = {
        member: write_with(
            tmp_path / member, model("llama", member, "bfloat16"), {name: torch.full((6,), value, dtype=torch.bfloat16)}
        )
        for member, value in (("base", 1.0), ("a", 1.5))
    }
    text = (
        f"merge_method: task_arithmetic\nmodels: [{{model: {folders['a']}, parameters: {{weight: 0.5}}}}]\n"
        f"base_model: {folders['base']}\n"
    )
    mine = read(seme.merge(text, tmp_path / "seme").path)
    other = read(oracle.merge(text, tmp_path / "mergekit", copy_tokenizer=False))
    assert set(mine) - set(other) == {name}
    assert mine[name].tolist() == [1.25] * 6


def test_shards_hold_the_same_tensors(model: Models, oracle: Oracle, record: Record, tmp_path: Path) -> None:
    text = Case("linear", "scalars", "llama", "stored").text(model)
    ours = seme.merge(text, tmp_path / "seme", out_shard_size=20_000).path
    theirs = oracle.merge(text, tmp_path / "mergekit", copy_tokenizer=False, out_shard_size=20_000)
    check(text, ours, theirs, oracle, record, "stored")
    maps = [json.loads((f / "model.safetensors.index.json").read_text())["weight_map"] for f in (ours, theirs)]
    assert maps[0].keys() == maps[1].keys()
    assert all(len(set(m.values())) > 1 for m in maps)


# Where seme is stricter: what mergekit passes over in silence is an error.


@pytest.mark.parametrize(
    ("method", "entry", "top", "message"),
    [
        ("ties", "normalize: false", "", r"models\[0\].parameters.normalize: shared by all models"),
        ("ties", "lambda: 0.1", "", r"models\[0\].parameters.lambda: shared by all models"),
        ("task_arithmetic", "normalize: true", "", r"models\[0\].parameters.normalize: shared by all models"),
        ("ties", "weigth: 0.9", "", r"models\[0\].parameters.weigth: .* did you mean 'weight'"),
        ("ties", "", "densty: 0.1", r"parameters.densty: .* did you mean 'density'"),
        ("task_arithmetic", "", "t: 0.5", r"parameters.t: task_arithmetic has no such parameter"),
    ],
)
def test_a_parameter_that_mergekit_ignores_is_an_error(
    method: str, entry: str, top: str, message: str, model: Models, oracle: Oracle, tmp_path: Path
) -> None:
    def text(entry: str, top: str) -> str:
        return (
            f"merge_method: {method}\nbase_model: {model('qwen2', 'base', 'bfloat16')}\nmodels:\n"
            f"  - {{model: {model('qwen2', 'a', 'bfloat16')}, parameters: {{weight: 0.5, {entry}}}}}\n"
            f"  - {{model: {model('qwen2', 'c', 'bfloat16')}, parameters: {{weight: 0.3}}}}\nparameters: {{{top}}}\n"
        )

    ignored = read(oracle.merge(text(entry, top), tmp_path / "with", copy_tokenizer=False))
    plain = read(oracle.merge(text("", ""), tmp_path / "without", copy_tokenizer=False))
    assert all(torch.equal(ignored[name], plain[name]) for name in plain)
    with pytest.raises(ConfigError, match=message):
        seme.merge(text(entry, top), tmp_path / "seme")
    assert not (tmp_path / "seme").exists()


REFUSED = {
    "three-to-slerp": """
merge_method: slerp
models: [{model: $a}, {model: $b}, {model: $base}]
base_model: $base
parameters: {t: 0.5}
""",
    "slerp-without-base": """
merge_method: slerp
models: [{model: $a}, {model: $b}]
parameters: {t: 0.5}
""",
    "slerp-without-t": """
merge_method: slerp
models: [{model: $a}, {model: $base}]
base_model: $base
""",
    "ties-without-base": """
merge_method: ties
models: [{model: $a, parameters: {weight: 1}}]
""",
    "ties-without-weight": """
merge_method: ties
models: [{model: $a}]
base_model: $base
""",
    "weight-for-some-tensors": """
merge_method: task_arithmetic
models: [{model: $a, parameters: {weight: {filter: mlp, value: 1}}}]
base_model: $base
""",
    "base-of-linear-without-weight": """
merge_method: linear
models: [{model: $a, parameters: {weight: 1}}]
base_model: $base
""",
    "a-model-twice": """
merge_method: linear
models: [{model: $a, parameters: {weight: 1}}, {model: $a, parameters: {weight: 2}}]
""",
    "other-shapes": """
merge_method: linear
models: [{model: $a, parameters: {weight: 1}}, {model: $wide, parameters: {weight: 2}}]
""",
    "weight-in-words": """
merge_method: linear
models: [{model: $a, parameters: {weight: heavy}}]
""",
}


@pytest.mark.parametrize("recipe", REFUSED.values(), ids=REFUSED)
def test_what_mergekit_refuses_seme_refuses(recipe: str, model: Models, oracle: Oracle, tmp_path: Path) -> None:
    members = {m: model("qwen2", m, "bfloat16") for m in ("base", "a", "b")}
    text = Template(recipe).substitute(members, wide=model("wide", "base", "bfloat16"))
    with pytest.raises(OracleError):
        oracle.merge(text, tmp_path / "mergekit", copy_tokenizer=False)
    with pytest.raises((ConfigError, CheckpointError)):
        seme.merge(text, tmp_path / "seme")
    assert not (tmp_path / "seme").exists()
