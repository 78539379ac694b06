"""seme/steps.py: several recipes in one file, of which later ones use what others made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import seme
from seme import cli
from seme.config import MergeConfig
from seme.errors import CheckpointError, SemeError, TargetError
from seme.steps import read as read_steps
from seme.steps import run as run_steps

from .checkpoints import decoder, read, write

TWO = """\
name: mean
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
---
merge_method: task_arithmetic
base_model: base
models: [{model: mean, parameters: {weight: 0.5}}]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, a and b in the current folder."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        write(Path(name), decoder(seed))
    return tmp_path


def expected() -> dict[str, torch.Tensor]:
    # Values are multiples of 2^-6, so that halves of sums are exact.
    base, a, b = (read(Path(n)) for n in ("base", "a", "b"))
    return {n: base[n] + 0.5 * ((a[n] + b[n]) / 2 - base[n]) for n in base}


def same(folder: Path) -> bool:
    found = read(folder)
    return all(torch.equal(t, found[n]) for n, t in expected().items())


def test_a_later_one_uses_the_result_of_an_earlier_one_and_nothing_is_left_of_that() -> None:
    result = seme.merge(TWO, "out")
    assert result.path == Path("out")
    assert same(Path("out"))
    assert sorted(p.name for p in Path().iterdir()) == ["a", "b", "base", "out"]
    card = Path("out/README.md").read_text()
    assert "- `mean`" in card
    assert "seme-steps" not in card
    # All of it is the recipe of what was made.
    again = Path("out/seme_config.yml")
    assert [s.name for s in read_steps(again)] == ["mean", None]


def test_in_whatever_order_and_from_mappings() -> None:
    import yaml

    first, second = yaml.safe_load_all(TWO)
    seme.merge([second, first], Path("out"))
    assert same(Path("out"))


def test_results_are_kept_where_asked_for() -> None:
    seme.merge(TWO, "out", keep_steps="steps")
    assert (Path("steps/mean/model.safetensors")).exists()
    assert same(Path("out"))
    with pytest.raises(TargetError, match=r"^steps/mean: not empty"):
        seme.merge(TWO, "other", keep_steps="steps")
    assert not Path("other").exists()


def test_the_last_one_is_the_output_if_all_have_names() -> None:
    seme.merge(TWO.replace("---\n", "---\nname: end\n"), "out")
    assert same(Path("out"))


def test_a_failure_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = decoder(3)
    bad["model.norm.weight"][0] = float("nan")
    write(Path("base"), bad)
    with pytest.raises(CheckpointError, match="inf or NaN"):
        seme.merge(TWO, "out")
    assert sorted(p.name for p in Path().iterdir()) == ["a", "b", "base"]


MISTAKES = {
    "circle": (
        [{"name": "x", "base_model": "y"}, {"name": "y", "base_model": "x"}, {"base_model": "x"}],
        "x: its result is needed to make it: x -> y -> x; break the circle",
    ),
    "itself": ([{"name": "x", "base_model": "x"}, {"base_model": "x"}], "x: its result is needed to make it: x -> x;"),
    "twice": ([{"name": "x"}, {"name": "x"}, {}], "document 2: name: x is given twice; choose another"),
    "unnamed": ([{}, {}], "document 2: name: missing, as in document 1; one is the output"),
    "bad-name": (
        [{"name": "x/y"}, {}],
        "document 1: name: 'x/y'; expected a name without / @ +, and not base or union",
    ),
    "base": ([{"name": "base"}, {}], "document 1: name: 'base'; expected a name"),
    "unused": ([{"name": "x"}, {}], "x: nothing uses its result; use it, remove it, or keep it with --keep-steps"),
    "unknown-key": ([{"name": "x", "dtyp": 1}, {"base_model": "x"}], "x: dtyp: unknown key; did you mean 'dtype'?"),
    "unknown-method": (
        [{"name": "x"}, {"base_model": "x", "merge_method": "tie"}],
        "merge_method: unknown method 'tie'; did you mean 'ties'?",
    ),
    "no-such-model": (
        [{"name": "x"}, {"base_model": "x", "models": [{"model": "./no"}]}],
        "./no: no such file or folder",
    ),
    "output-is-used": (
        [{"name": "x", "base_model": "y"}, {"name": "y"}],
        "x: uses y, which is the output; give another document no name",
    ),
}


@pytest.mark.parametrize(("documents", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found_before_anything_is_made(documents: list[dict[str, Any]], message: str) -> None:
    common = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}}
    with pytest.raises(SemeError) as e:
        seme.merge([{**common, **d} for d in documents], "out", keep_steps=None)
    assert str(e.value).startswith(message)
    assert sorted(p.name for p in Path().iterdir()) == ["a", "b", "base"]


def test_a_name_without_others_has_no_effect() -> None:
    """mergekit-yaml does not look at it, and recipes in model cards often have one."""
    seme.merge(TWO.partition("---")[0], "out")
    seme.merge(TWO.partition("---")[0].replace("name: mean", ""), "plain")
    assert Path("out/model.safetensors").read_bytes() == Path("plain/model.safetensors").read_bytes()


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yml").write_text(TWO)
    assert cli.main(["merge", "recipe.yml", "out", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "step      mean\nmethod    linear" in told
    assert "step      the output\nplanned when there is mean" in told
    assert cli.main(["merge", "recipe.yml", "out", "--dry-run", "--json"]) == 0
    assert [s["name"] for s in json.loads(capsys.readouterr().out)] == ["mean", None]
    assert not Path("out").exists()
    assert cli.main(["merge", "recipe.yml", "out", "--keep-steps", "steps"]) == 0
    assert "step: mean" in capsys.readouterr().out
    assert same(Path("out"))
    assert Path("steps/mean").is_dir()


def test_a_result_goes_after_its_last_use(tmp_path: Path) -> None:
    common = {"merge_method": "linear", "parameters": {"weight": 1}}
    documents = [
        {**common, "name": "x", "models": [{"model": "a"}, {"model": "b"}]},
        {**common, "name": "y", "models": [{"model": "x"}, {"model": "b"}]},
        {**common, "models": [{"model": "y"}, {"model": "a"}]},
    ]
    seen = []

    def merge(config: MergeConfig, name: str | None, place: Path) -> None:
        seen.append((name, sorted(p.name for p in (tmp_path / "w").iterdir()), [str(e.ref) for e in config.models]))
        if name is not None:
            place.mkdir()

    for keep, left in ((None, ["y"]), (tmp_path / "w", ["x", "y"])):
        (tmp_path / "w").mkdir()
        run_steps(read_steps(documents), tmp_path / "w", keep, merge)
        assert seen == [("x", [], ["a", "b"]), ("y", ["x"], ["x", "b"]), (None, left, ["y", "a"])]
        seen.clear()
        shutil.rmtree(tmp_path / "w")
