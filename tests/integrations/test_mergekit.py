"""seme inside mergekit: its registry, its in-memory API and its command, with the real package."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seme
from seme import native
from seme.methods import methods
from tests.checkpoints import read
from tests.differential.families import FAMILIES, make

pytest.importorskip("mergekit", reason="mergekit is not installed; it comes with the extra 'test'")

from mergekit import merge_methods

from seme.integrations import mergekit as integration

pytestmark = pytest.mark.skipif(native.why_not("_C") is not None, reason="seme._C is not built: SEME_NATIVE=1")

PARAMETERS = {
    "linear": {"weight": [0.3, 0.5, 0.4]},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weight": [0.3, 0.6], "lambda": 0.7},
    "ties": {"weight": {1: 0.3, 2: 0.6}, "density": 0.6},
    "sce": {"select_topk": 0.5},
    "ramplus_tl": {"r": 0.4},
}
RANDOM = integration.RANDOM


@pytest.fixture
def installed():
    names = integration.install()
    yield names
    integration.uninstall()


def states(count=3, dtype=torch.float32):
    """A base and fine-tunes of it, two tensors each, off any grid: no ties."""
    generator = torch.Generator().manual_seed(0)
    base = {"a.weight": 0.02 * torch.randn(40, 33, generator=generator), "a.bias": torch.randn(40, generator=generator)}
    tuned = [
        {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for _ in range(count - 1)
    ]
    return [{k: v.to(dtype) for k, v in state.items()} for state in (base, *tuned)]


def count_of(name):
    return min(3, merge_methods.get(name).spec.contract.max_inputs or 3)


def test_methods_are_registered_once_and_given_back():
    before = dict(merge_methods.registry._METHODS)
    names = integration.install()
    try:
        assert set(names) == set(methods())
        known = dict(merge_methods.registry._METHODS)
        assert integration.install() == names
        assert known == merge_methods.registry._METHODS
        assert merge_methods.get("seme").spec.name == "seme"
        for name in set(names) & set(before):
            assert merge_methods.get(name).spec is before[name].spec
    finally:
        integration.uninstall()
    assert before == merge_methods.registry._METHODS


def test_parameters_of_seme_are_its_own(installed):
    spec = merge_methods.get("seme").spec
    found = {p.name: (p.value_type, p.scope.value, None if p.required else p.default) for p in spec.parameters}
    scopes = {"shared": "shared", "expert": "non_base", "model": "input"}
    assert found == {p.name: (p.kind, scopes[p.scope], p.default) for p in methods()["seme"].params}
    assert spec.contract.base is merge_methods.BasePolicy.REQUIRED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(methods()) - {"seme", "tsv_m", "iso_c"} - set(RANDOM)))
def test_values_are_mergekits(name, dtype):
    """In the dtype of the inputs, as mergekit computes."""
    inputs = states(count_of(name), dtype)
    original = merge_methods.get(name)
    base = None if original.spec.contract.base is merge_methods.BasePolicy.IGNORED else 0
    required = [p.name for p in original.spec.parameters if p.required]
    given = PARAMETERS.get(name) or dict.fromkeys(required, 0.4)
    theirs = merge_methods.merge_state_dicts(inputs, name, base=base, parameters=given)
    integration.install()
    try:
        assert merge_methods.get(name) is not original
        ours = merge_methods.merge_state_dicts(inputs, name, base=base, parameters=given)
    finally:
        integration.uninstall()
    for key, value in ours.items():
        assert value.dtype == dtype
        # A few roundings of numbers below 4: float32's of sums and norms, bfloat16's of a result.
        limit = 32 * 4 * 2.0**-24 if dtype == torch.float32 else 4 * 2.0**-8
        far = (value.double() - theirs[key].double()).abs() > limit
        # Arcee Fusion takes other elements where the importance is that close to the threshold.
        assert far.sum() <= (0.01 * far.numel() if name == "arcee_fusion" else 0)


def test_dtypes_of_the_call_hold(installed):
    inputs = states(3, torch.bfloat16)
    given = {"weight": 0.3}
    merged = merge_methods.merge_state_dicts(
        inputs, "ties", base=0, parameters=given, dtype=torch.float32, out_dtype=torch.float16
    )
    wide = [{k: v.float() for k, v in state.items()} for state in inputs]
    expected = seme.merge_state_dicts(wide, "ties", base=0, parameters=given, out_dtype=torch.float16)
    assert all(torch.equal(merged[k], expected[k]) for k in expected)


def test_what_seme_does_not_compute_is_left_to_mergekit(installed):
    """Gradients that are recorded, and values that seme refuses."""
    base, tuned = states(2)
    tuned = {k: v.requires_grad_() for k, v in tuned.items()}
    merged = merge_methods.merge_state_dicts([base, tuned], "task_arithmetic", base=0, parameters={"weight": 0.25})
    merged["a.bias"].sum().backward()
    assert torch.equal(tuned["a.bias"].grad, torch.full((40,), 0.25))
    with torch.no_grad():
        beyond = merge_methods.merge_state_dicts([base, tuned], "ties", base=0, parameters={"weight": 1, "density": 2})
        all_kept = merge_methods.merge_state_dicts([base, tuned], "ties", base=0, parameters={"weight": 1})
    assert all(torch.equal(beyond[k], all_kept[k]) for k in base)
    with pytest.raises(TypeError, match="nonsense"):
        merge_methods.merge_state_dicts([base, tuned], "ties", base=0, parameters={"weight": 1, "nonsense": 2})


def test_seme_sees_the_whole_model(installed, tmp_path):
    """What a tensor is follows from all of them: one call of mergekit's is one merge of seme's."""
    inputs = [read(make(tmp_path / m, "qwen2", m, "float32")) for m in ("base", "a", "c")]
    given = {"weight": [1.0, 2.0], "sigma": 0.5}
    merged = merge_methods.merge_state_dicts(inputs, "seme", base=0, parameters=given)
    expected = seme.merge_state_dicts(inputs, "seme", base=0, parameters=given)
    assert all(torch.equal(merged[k], expected[k]) for k in expected)


RECIPES = {
    "seme": "merge_method: seme\nmodels: [{{model: {a}}}, {{model: {c}, parameters: {{weight: 2}}}}]\n",
    "ties": "merge_method: ties\nmodels: [{{model: {a}}}, {{model: {c}}}]\n"
    "parameters: {{weight: [0.3, 0.8], density: 0.5}}\n",
}


@pytest.mark.parametrize("name", RECIPES)
def test_command(name, tmp_path):
    """GPT-2 stores its matrices the other way round: that is seen in the header of the base model."""
    family = "gpt2" if name == "seme" else "llama"
    assert family in FAMILIES
    folders = {m: make(tmp_path / m, family, m, "float32") for m in ("base", "a", "c")}
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(RECIPES[name].format(**folders) + f"base_model: {folders['base']}\n")
    command = [sys.executable, "-c", "from seme.integrations.mergekit import main; main()"]
    done = subprocess.run(
        [*command, str(recipe), str(tmp_path / "out"), "--no-copy-tokenizer", "--quiet", "-j", "1"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, expected = read(tmp_path / "out"), read(seme.merge(recipe, tmp_path / "seme", threads=1).path)
    assert set(found) == set(expected)
    for key in expected:
        # Sums of matrix products have no fixed order; the rest is equal.
        limit = 1e-5 if name == "seme" else 0
        assert (found[key] - expected[key]).abs().max() <= limit, key


def test_console_script():
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert '\nseme-mergekit-yaml = "seme.integrations.mergekit:main"\n' in project
    assert callable(integration.main)


def test_without_mergekit_the_message_says_what_to_install(tmp_path):
    """A mergekit that cannot be imported, in front of the real one."""
    (tmp_path / "mergekit").mkdir()
    (tmp_path / "mergekit" / "__init__.py").write_text("raise ImportError('broken on purpose')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import seme.integrations.mergekit"
    done = subprocess.run(
        [shutil.which(sys.executable) or sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode != 0
    assert "pip install 'seme[mergekit]'" in done.stderr.splitlines()[-1]
