"""Verification: what is whole passes, and whatever is changed in a model is found and named."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from seme import cli, merge, verify
from seme import verifying as verifying_module
from seme.checkpoint import Writer, beside
from seme.checkpoint.journal import Journal
from seme.checkpoint.safetensors import read_header
from seme.errors import CheckpointError, ConfigError, KeptInterrupt, SemeError

from . import models as make
from .checkpoints import CONFIG, decoder, tokenizer, write

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, decoder(seed))
    tokenizer(tmp_path / "base", ["<unk>", "a"])
    return tmp_path


def recipe(method: str = "task_arithmetic", weight: float = 0.5, **more: Any) -> dict[str, Any]:
    models = [{"model": m, "parameters": {"weight": weight}} for m in ("a", "b")]
    return {"merge_method": method, "base_model": "base", "models": models, **more}


def merged(config: dict[str, Any] | None = None, out: str = "out", **options: Any) -> Path:
    merge(config or recipe(), out, **{"threads": 1, "checksums": True, **options})
    return Path(out)


def check(out: str | Path = "out", against: Any = None, **options: Any) -> Any:
    return verify(out, against, **{"threads": 1, **options})


def lines(out: str | Path = "out", against: Any = None, **options: Any) -> list[str]:
    return [str(p) for p in check(out, against, **options).problems]


def seme(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    return code, *capsys.readouterr()


def flip(file: Path, at: int) -> None:
    """Change the lowest bit of a byte."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def place(out: Path, name: str) -> tuple[Path, int]:
    """The file of a tensor, and where in it the tensor begins."""
    found = {t.name: t for file in out.glob("*.safetensors") for t in read_header(file)}
    return found[name].file, found[name].offset


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


class TestWhole:
    @pytest.mark.parametrize("shard", ["5GB", "2kB"])
    def test_a_merge_passes_and_nothing_is_written(self, shard: str, here: Path) -> None:
        out = merged(out_shard_size=shard)
        assert (len(list(out.glob("*.safetensors"))) > 3) == (shard == "2kB")
        before = state(here)
        report = check(out, recipe(), sample="all")
        assert report.problems == []
        assert report.tensors == report.hashed == 30
        assert set(report.recomputed) == set(decoder(0))
        assert report.bytes == sum(t.nbytes for t in decoder(0).values())
        assert state(here) == before

    def test_a_copy_elsewhere(self, here: Path) -> None:
        shutil.move(merged(), here / "elsewhere")
        assert lines("elsewhere", recipe()) == []

    @pytest.mark.parametrize(
        ("method", "parameters", "options"),
        [
            ("dare_ties", {"density": 0.5}, {"seed": 3}),
            ("della", {"density": 0.5}, {"memory": "1MiB"}),
            ("ties", {"density": 0.4}, {"out_shard_size": "1kB"}),
            ("slerp", {"t": 0.3}, {}),
            ("task_arithmetic", {}, {"compat": "mergekit"}),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_methods(self, method: str, parameters: dict[str, Any], options: dict[str, Any]) -> None:
        config = recipe(method, parameters=parameters, dtype="bfloat16")
        if method == "slerp":
            config["models"] = [{"model": "a"}]
        merged(config, checksums=False, **options)
        same = {k: v for k, v in options.items() if k in ("seed", "compat")}
        assert len(check("out", config, sample="all", **same).recomputed) == 30
        assert lines("out", config, sample="all", **same) == []
        assert lines("out", config, sample=5, **same) == []
        if "seed" in options:
            assert "elements are not what the recipe gives" in lines("out", config)[0]
            assert lines("out", Path("out/seme_config.yml")) == []  # has the seed

    @pytest.mark.parametrize("method", ["seme", "iso_c"])
    def test_matrix_methods(self, method: str, tmp_path: Path) -> None:
        base = make.llama(tmp_path / "m0", hidden=16, dtype=torch.float32)
        tuned = [make.perturbed(base, tmp_path / f"m{i}", seed=i) for i in (1, 2)]
        config = {"merge_method": method, "base_model": str(base), "models": [{"model": str(t)} for t in tuned]}
        out = merged(config)
        report = check(out, config, sample=6)
        assert (report.problems, len(report.recomputed)) == ([], 6)
        assert lines(out, config, sample="all") == []
        # Of a method whose sums have no order, a last bit is told from another recipe.
        name = next(n for n in load_file(out / "model.safetensors") if n.endswith("up_proj.weight"))
        file, at = place(out, name)
        flip(file, at)
        assert "; it may come from other --threads, " in lines(out, config, sample="all")[-1]
        other = lines(out, {**config, "parameters": {"lambda": 3.0}}, sample="all")
        assert "--threads" not in next(line for line in other[2:] if name in line)

    def test_rule_sequence_is_computed_as_a_whole(self, tmp_path: Path) -> None:
        base = make.llama(tmp_path / "m0", hidden=16, dtype=torch.float32)
        tuned = [make.perturbed(base, tmp_path / f"m{i}", seed=i) for i in (1, 2)]
        config = {
            "merge_method": "seme",
            "base_model": str(base),
            "models": [{"model": str(t)} for t in tuned],
            "parameters": {"rule": "sequence", "probes": 1},
        }
        merged(config)
        report = check("out", config, sample=2)
        assert report.problems == []
        assert len(report.recomputed) == report.tensors
        assert "all of them are computed again" in report.notes[0]
        tensors = load_file("out/model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
        save_file(tensors, "out/model.safetensors")
        Path("out/seme_manifest.json").unlink()
        assert [p.tensor for p in check("out", config).problems] == ["model.norm.weight"]  # the others are equal still

    def test_integers_are_compared(self, here: Path) -> None:
        for name in ("base", "a", "b"):
            write(here / name, {**decoder(1), "model.ids": torch.arange(9)})
        out = merged(checksums=False)
        assert lines(out, recipe(), sample="all") == []
        file, at = place(out, "model.ids")
        flip(file, at + 9)
        assert lines(out, recipe(), sample="all") == [
            "model.safetensors: tensor model.ids: 1 of 9 elements are not what the recipe gives, the largest "
            "difference is 256"
        ]


class TestManifest:
    def test_contents(self) -> None:
        found = json.loads((merged() / "seme_manifest.json").read_text())
        assert (found["format"], found["algorithm"]) == (1, "blake2b-128")
        assert found["tensors"].keys() == decoder(0).keys()
        entry = found["tensors"][NAME]
        assert (entry["file"], entry["dtype"], entry["shape"]) == ("model.safetensors", "float32", [12, 8])
        assert {"config.json", "tokenizer.json", "README.md", "seme_config.yml"} <= found["files"].keys()
        assert not {"seme_manifest.json", "model.safetensors"} & found["files"].keys()
        hashes = [*(e["hash"] for e in found["tensors"].values()), *found["shards"].values(), *found["files"].values()]
        assert all(len(bytes.fromhex(h)) == 16 for h in hashes)

    def test_without_the_option_there_is_none(self) -> None:
        assert not (merged(checksums=False) / "seme_manifest.json").exists()
        assert check("out").hashed is None

    def test_of_a_merge_that_goes_on(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(Writer, "commit", stop)
            with pytest.raises(KeptInterrupt):
                merged(checksums=False)
        out = merged(resume=True)
        assert check(out, recipe(), sample="all").hashed == 30
        assert lines(out) == []

    def test_of_a_merge_that_was_complete(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as m:  # killed after the model was in its place
            m.setattr(Journal, "remove", Journal.close)
            out = merged(checksums=False)
        assert beside(out.resolve(), "journal").exists()
        merged(resume=True)
        assert check(out).hashed == 30
        assert lines(out) == []


class TestDamage:
    """Each is found, with file and tensor, and nothing else is reported."""

    def test_a_flipped_bit(self) -> None:
        out = merged(out_shard_size="2kB")
        file, at = place(out, NAME)
        flip(file, at + 40)
        assert lines(out) == [
            f"{file.name}: tensor {NAME}: its bytes are not those that were written (hash); copy it again"
        ]
        (out / "seme_manifest.json").unlink()
        assert lines(out) == []
        (found,) = lines(out, recipe(), sample="all")
        assert found.startswith(f"{file.name}: tensor {NAME}: 1 of 96 elements are not what the recipe gives, the larg")

    @pytest.mark.parametrize("checksums", [True, False])
    def test_a_truncated_shard(self, checksums: bool) -> None:
        out = merged(out_shard_size="2kB", checksums=checksums)
        file, _ = place(out, NAME)
        size = file.stat().st_size
        os.truncate(file, size - 1)
        expected = f"{file.name}: {size - 1} bytes, the header describes {size}; truncated; copy it again"
        assert lines(out) == [expected]
        assert lines(out, recipe(), sample="all") == [expected]
        file.unlink()
        assert lines(out, recipe(), sample="all") == [f"{file.name}: missing, the index names it; copy it again"]

    @pytest.mark.parametrize("size", [0, 7, 100, 3000])
    def test_the_only_shard_truncated(self, size: int) -> None:
        out = merged()
        os.truncate(out / "model.safetensors", size)
        (found,) = lines(out, recipe(), sample="all")
        assert found.startswith("model.safetensors: ")
        assert found.endswith("; copy it again")

    def test_all_shards_gone(self) -> None:
        out = merged()
        (out / "model.safetensors").unlink()
        assert lines(out, recipe(), sample="all") == ["model.safetensors: missing, the manifest has it; copy it again"]

    @pytest.mark.parametrize("checksums", [True, False])
    def test_a_missing_tensor(self, checksums: bool) -> None:
        out = merged(checksums=checksums)
        tensors = load_file(out / "model.safetensors")
        del tensors[NAME]
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        found = lines(out, recipe(), sample="all")
        assert [line for line in found if NAME in line] == [
            f"model.safetensors: tensor {NAME}: missing, the manifest has it; copy it again"
            if checksums
            else f"tensor {NAME}: missing, the recipe gives it; copy it again"
        ]

    def test_another_tensor(self) -> None:
        out = merged()
        tensors = {**load_file(out / "model.safetensors"), "spare": torch.ones(3)}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        found = [line for line in lines(out, recipe()) if "tensor spare" in line]
        assert found == [
            "model.safetensors: tensor spare: not in the manifest; was it added after the merge?",
            "model.safetensors: tensor spare: the recipe gives no such tensor",
        ]

    def test_another_shape_and_dtype(self) -> None:
        out = merged()
        tensors = load_file(out / "model.safetensors")
        tensors[NAME] = tensors[NAME].T.contiguous()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        found = lines(out, recipe(), sample="all")
        start = f"model.safetensors: tensor {NAME}: "
        assert f"{start}shape [8, 12], the manifest has [12, 8]; copy it again" in found
        assert f"{start}is float32 [8, 12], the recipe gives float32 [12, 8]; is it the recipe of this model?" in found
        assert any("model.norm.weight: dtype 'float16', the manifest has 'float32'" in line for line in found)
        assert any("model.norm.weight: is float16 [8], the recipe gives float32 [8]" in line for line in found)

    def test_nan(self) -> None:
        out = merged(checksums=False)
        tensors = load_file(out / "model.safetensors")
        tensors[NAME][0, 1:3] = float("nan")
        tensors[NAME][5, 5] = float("-inf")
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        what = f"model.safetensors: tensor {NAME}: 3 of 96 elements are inf or NaN; copy it again, or merge again"
        assert lines(out) == [what]
        assert lines(out, nonfinite="keep") == []
        assert lines(out, recipe(), sample="all") == [
            what,
            f"model.safetensors: tensor {NAME}: 3 of 96 elements are not what the recipe gives, the largest difference "
            "is inf",
        ]

    def test_nan_that_the_merge_kept(self, here: Path) -> None:
        tensors = decoder(1)
        tensors[NAME][3] = float("nan")
        write(here / "a", tensors)
        out = merged(nonfinite="keep")
        assert lines(out, recipe(), sample="all", nonfinite="keep") == []
        assert "8 of 96 elements are inf or NaN" in lines(out)[0]
        file, at = place(out, NAME)
        flip(file, at + 4 * 3 * 8)  # another NaN is a NaN all the same, but not the bytes that were written
        assert [line.partition("(")[2] for line in lines(out, recipe(), sample="all", nonfinite="keep")] == [
            "hash); copy it again"
        ]
        with pytest.raises(CheckpointError, match=r"a/model.safetensors: tensor .* are inf or NaN; repair the model"):
            check(out, recipe(), sample="all")

    def test_a_header_that_was_changed(self) -> None:
        out = merged()
        file = out / "model.safetensors"
        file.write_bytes(file.read_bytes().replace(b'"format":"pt"', b'"format":"tp"', 1))
        assert lines(out) == ["model.safetensors: its header is not what was written; copy it again"]

    def test_small_files(self) -> None:
        out = merged()
        (out / "config.json").write_text(json.dumps(CONFIG))
        (out / "tokenizer.json").unlink()
        (out / "notes.txt").write_text("of no concern")
        assert lines(out) == [
            "config.json: not what was written; copy it again, unless it was edited",
            "tokenizer.json: missing, the manifest has it; copy it again",
        ]

    def test_one_does_not_hide_another(self, here: Path) -> None:
        out = merged(out_shard_size="2kB")
        (out / "tokenizer.json").unlink()
        file, _ = place(out, NAME)
        os.truncate(file, 100)
        for name in ("base", "a", "b"):
            write(here / name, {**decoder(1), "model.more": torch.ones(2)})
        assert [line.partition("; ")[0] for line in lines(out, recipe(), sample=1)[:3]] == [
            f"{file.name}: header says {int.from_bytes(file.read_bytes()[:8], 'little')} bytes, the file has 92 left",
            "tokenizer.json: missing, the manifest has it",
            "tensor model.more: missing, the recipe gives it",
        ]

    def test_a_file_that_cannot_be_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        out = merged(out_shard_size="2kB")
        file, at = place(out, NAME)
        real = os.preadv

        def preadv(descriptor: int, buffers: Any, offset: int) -> int:
            if offset == at and os.path.samestat(os.fstat(descriptor), file.stat()):
                raise OSError(errno.EIO, "Input/output error")
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        expected = f"{file.name}: tensor {NAME}: read failed: Input/output error; copy it again"
        assert lines(out, recipe(), sample="all") == [expected]

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"format": 2}, "format 2 with 'blake2b-128' is not known; use the version of seme that wrote it"),
            ({"tensors": []}, "tensors, shards or files are missing in it; copy it again"),
            ({"files": {"../recipe.yml": "00"}}, "file '../recipe.yml' is not in the folder; copy it again"),
        ],
    )
    def test_a_manifest_that_is_none(self, change: dict[str, Any], expected: str) -> None:
        out = merged()
        found = json.loads((out / "seme_manifest.json").read_text())
        (out / "seme_manifest.json").write_text(json.dumps({**found, **change}))
        assert lines(out) == [f"seme_manifest.json: {expected}"]
        (out / "seme_manifest.json").write_text("{")
        assert lines(out)[0].startswith("seme_manifest.json: not valid JSON: ")


class TestIndex:
    def edit(self, change: Callable[[dict[str, Any]], object]) -> list[str]:
        out = merged(out_shard_size="2kB", checksums=False)
        file = out / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index)
        file.write_text(json.dumps(index))
        return lines(out)

    def test_a_tensor_in_another_shard(self) -> None:
        shard = {}

        def change(index: dict[str, Any]) -> None:
            shard.update(index["weight_map"])
            index["weight_map"][NAME] = shard["model.norm.weight"]

        assert self.edit(change) == [
            f"{shard['model.norm.weight']}: tensor {NAME}: the index says it is here, {shard[NAME]} has it; "
            "copy it again"
        ]

    def test_a_tensor_that_is_nowhere(self) -> None:
        found = self.edit(lambda index: index["weight_map"].update(nowhere="model-00001-of-00004.safetensors"))
        assert found == ["model-00001-of-00004.safetensors: tensor nowhere: missing; copy it again"]

    def test_a_tensor_that_is_not_listed(self) -> None:
        (found,) = self.edit(lambda index: index["weight_map"].pop(NAME))
        assert found.endswith(f"tensor {NAME}: not in the index; copy it again")

    def test_total_size(self) -> None:
        found = self.edit(lambda index: index["metadata"].update(total_size=5))
        size = sum(t.nbytes for t in decoder(0).values())
        assert found == [f"model.safetensors.index.json: total_size is 5, the shards hold {size} bytes; copy it again"]

    def test_a_file_outside(self) -> None:
        found = self.edit(lambda index: index["weight_map"].update({NAME: "../model.safetensors"}))
        assert found[0] == (
            f"model.safetensors.index.json: tensor {NAME}: file '../model.safetensors' is no safetensors file of the "
            "folder; copy it again"
        )

    def test_another_shard(self) -> None:
        out = merged(out_shard_size="2kB")
        shutil.copy(out / "model-00002-of-00004.safetensors", out / "model-00005-of-00004.safetensors")
        assert lines(out) == [
            "model-00005-of-00004.safetensors: not a part of the model, but may be taken for one; remove it"
        ]

    def test_a_tensor_in_two_shards(self) -> None:
        out = merged(out_shard_size="2kB", checksums=False)
        first, second = "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"
        tensors = load_file(out / first)
        name = next(iter(tensors))
        save_file({**load_file(out / second), name: tensors[name]}, out / second)
        found = lines(out)
        assert f"{second}: tensor {name}: in {first} too; copy it again" in found
        assert [line for line in found if "total_size" not in line and name not in line] == []

    def test_gone_or_broken(self) -> None:
        out = merged(out_shard_size="2kB", checksums=False)
        (out / "model.safetensors.index.json").write_text("[]")
        assert lines(out) == ["model.safetensors.index.json: a JSON list, expected an object; copy it again"]
        (out / "model.safetensors.index.json").unlink()
        assert lines(out) == ["model.safetensors.index.json: missing, and no model.safetensors; copy it again"]


class TestAgainst:
    def test_another_recipe(self) -> None:
        out = merged()
        report = check(out, recipe(weight=0.25), sample=7)
        assert len(report.recomputed) == len(report.problems) == 7
        assert {p.tensor for p in report.problems} == set(report.recomputed)
        assert "elements are not what the recipe gives, the largest difference is " in str(report.problems[0])

    def test_the_sample_is_drawn_by_its_seed(self) -> None:
        out = merged()
        first, same, other = (check(out, recipe(), sample=5, sample_seed=s).recomputed for s in (1, 1, 2))
        assert first == same != other
        assert len(first) == len(other) == 5
        assert len(check(out, recipe(), sample=1000).recomputed) == 30

    def test_every_byte_is_compared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With every element of the model another one, all of them are counted."""
        out = merged(checksums=False)
        tensors = {k: v + 1 for k, v in load_file(out / "model.safetensors").items()}
        save_file(tensors, out / "model.safetensors")
        found = check(out, recipe(), sample="all").problems
        assert [p.what.split(" elements")[0] for p in found] == [
            f"{t.numel()} of {t.numel()}" for t in tensors.values()
        ]

    def test_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(verifying_module.manifest, "PIECE", 64)
        out = merged()
        file, at = place(out, NAME)
        flip(file, at + 4 * 95)
        hashed, computed = lines(out, recipe(), sample="all")
        assert "(hash)" in hashed
        assert "1 of 96 elements" in computed

    def test_mistakes(self, here: Path) -> None:
        out = merged()
        for sample in ("0", "-1", "many", 0):
            with pytest.raises(ConfigError, match=r"sample: .*; expected a number of tensors, at least 1, or all"):
                check(out, recipe(), sample=sample)
        with pytest.raises(ConfigError, match="merge_method: unknown method"):
            check(out, recipe("tise"))
        with pytest.raises(ConfigError, match="against: the recipe has 2 documents"):
            check(out, [{**recipe(), "name": "one"}, {**recipe(), "base_model": "one"}])
        (here / "empty").mkdir()
        for folder, said in (("empty", "no safetensors file"), ("nowhere", "cannot be read"), ("out/README.md", "")):
            with pytest.raises(SemeError, match=f"{folder}: .*{said}"):
                check(folder)


class TestCommand:
    def test_fine(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("recipe.yml").write_text(json.dumps(recipe("dare_ties", parameters={"density": 0.5})))
        assert seme(capsys, "merge", "recipe.yml", "out", "--checksums", "--seed", "4", "--quiet")[0] == 0
        assert seme(capsys, "verify", "out")[1] == "out: fine: 30 tensors, 7.1 kB read, 30 hashes compared\n"
        code, out, err = seme(capsys, "verify", "out", "--against", "recipe.yml", "--seed", "4", "--sample", "9")
        assert (code, err) == (0, "")
        assert out == "out: fine: 30 tensors, 7.1 kB read, 30 hashes compared, 9 tensors computed again\n"
        assert seme(capsys, "verify", "out", "--against", "recipe.yml", "--seed", "4", "--quiet") == (0, "", "")
        code, out, err = seme(capsys, "verify", "out", "--against", "out/seme_config.yml", "--sample", "all", "--json")
        found = json.loads(out)
        assert (code, found["tensors"], found["hashed"], found["problems"]) == (0, 30, 30, [])
        assert len(found["recomputed"]) == 30

    def test_problems(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("recipe.yml").write_text(json.dumps(recipe(weight=0.1)))
        merged(checksums=False)
        code, out, err = seme(capsys, "verify", "out", "--against", "recipe.yml", "--sample", "all", "--quiet")
        assert (code, err) == (1, "")
        assert len(out.splitlines()) == 22
        assert out.splitlines()[20] == "and 10 more; --json lists all"
        assert out.splitlines()[21] == (
            "out: 30 problem(s): 30 tensors, 7.1 kB read, no manifest, 30 tensors computed again"
        )
        code, out, err = seme(capsys, "verify", "out", "--against", "recipe.yml", "--sample", "all", "--json")
        assert code == 1
        assert len(json.loads(out)["problems"]) == 30
        assert json.loads(out)["problems"][0].keys() == {"file", "tensor", "what"}

    def test_mistakes(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = seme(capsys, "verify", "nowhere")
        assert (code, out) == (2, "")
        assert err == "seme: error: nowhere: cannot be read: No such file or directory; correct the path\n"
        merged()
        code, _, err = seme(capsys, "verify", "out", "--against", "nowhere.yml")
        assert code == 2
        assert err.startswith("seme: error: nowhere.yml: ")
