"""A merge that was killed or stopped goes on, and gives the bytes of one that was not."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import seme.checkpoint.writer as writing
from seme import merge, resuming
from seme.checkpoint import Checkpoint, Writer, beside
from seme.checkpoint.journal import Journal
from seme.cli import main
from seme.errors import CheckpointError, KeptInterrupt, TargetError

ROOT = Path(__file__).parent.parent
SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (300, 700) for i in range(6)} | {"model.norm.weight": (700,)}


def model(folder: Path, seed: int) -> None:
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=g).bfloat16() for name, shape in SHAPES.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for i in range(3):
        model(tmp_path / f"m{i}", i)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(method: str = "ties", weight: float = 0.5) -> dict[str, Any]:
    parameters = {"weight": weight, **({"density": 0.4} if method == "ties" else {})}
    experts = [{"model": str(Path(f"m{i}").resolve()), "parameters": parameters} for i in (1, 2)]
    base = {} if method == "linear" else {"base_model": str(Path("m0").resolve())}
    return {"merge_method": method, "models": experts, "dtype": "bfloat16", **base}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"}


def failing(monkeypatch: pytest.MonkeyPatch, name: str, at: int, error: BaseException) -> None:
    """Have call number ``at`` of an ``os`` function, and those after it, fail."""
    real, calls = getattr(os, name), [0]

    def call(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] >= at:
            raise error
        return real(*args)

    monkeypatch.setattr(os, name, call)


def stopped(at: int, monkeypatch: pytest.MonkeyPatch, error: BaseException, config: Any = None, **options: Any) -> None:
    """Run a merge of which write number ``at`` fails."""
    with monkeypatch.context() as m:
        failing(m, "pwrite", at, error)
        with pytest.raises(type(error) if not isinstance(error, OSError) else TargetError):
            merge(config or recipe(), "out", **{"memory": "1MiB", "threads": 1, **options})


@pytest.mark.parametrize(
    ("method", "old"),
    [("linear", False), ("ties", True), ("della", False)],
    ids=["linear", "ties over an old model", "della"],
)
def test_killed_at_any_point(method: str, old: bool, models: Path) -> None:
    """50 and more points each, shard creation, journal, small files, syncs and renames among them."""
    config = recipe(method)
    if method == "della":
        for entry in config["models"]:
            entry["parameters"]["density"] = 0.5
    Path("recipe.yml").write_text(json.dumps(config))
    if old:
        model(models / "old", 9)
    command = [sys.executable, "-m", "tests.killed", str(models / "recipe.yml"), str(models), "50", "0"]
    options = ["--threads", "1", "--memory", "2MiB", "--out-shard-size", "1MB"]
    run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["lost"] == []
    killed = found["killed"]
    assert found["points"] >= 50
    assert killed.pop("going on") > 5
    assert {"pwrite", "write", "fsync", "rename", "posix_fallocate", "text", "copy", "replace"} <= killed.keys()
    # Killed up to twice, and each time 3 workers (one thread, two that wait for the disk) had one buffer each; a third
    # of 2 MiB is what a worker has, for its inputs and an output.
    assert found["redone"] <= 2 * 3 * (2 << 20) // 9


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_only_what_is_missing_is_written(method: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merge(recipe(method), "whole", threads=1)
    stopped(9, monkeypatch, OSError(errno.ENOSPC, "No space left on device"), recipe(method))
    assert not Path("out").exists()
    result = merge(recipe(method), "out", resume=True, threads=2, memory="1MiB")
    assert 0 < result.bytes_written < expected.bytes_written
    assert contents(Path("out")) == contents(Path("whole"))
    assert not [p for p in os.listdir() if p.startswith(".")]


def test_a_matrix_method_goes_on_with_as_many_threads(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merge(recipe("iso_c"), "whole", threads=1)
    stopped(4, monkeypatch, OSError(errno.ENOSPC, "No space left on device"), recipe("iso_c"), memory=None)
    with pytest.raises(TargetError, match=r"it ran on .*--threads 1, --memory .*, now it would on .*--threads 2"):
        merge(recipe("iso_c"), "out", resume=True, threads=2)
    result = merge(recipe("iso_c"), "out", resume=True, threads=1)
    assert 0 < result.bytes_written < expected.bytes_written
    assert contents(Path("out")) == contents(Path("whole"))


def test_the_merge_report_is_that_of_a_whole_run(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("m0", "m1", "m2"):
        g = torch.Generator().manual_seed(int(name[1]))
        stored = {"model.embed_tokens.weight": torch.randn(50, 32, generator=g), "model.norm.weight": torch.ones(32)}
        for i in range(3):
            stored[f"model.layers.{i}.mlp.up_proj.weight"] = torch.randn(64, 32, generator=g)
            stored[f"model.layers.{i}.mlp.down_proj.weight"] = torch.randn(32, 64, generator=g)
        save_file({k: v.bfloat16() for k, v in stored.items()}, f"{name}/model.safetensors")
        Path(name, "tokenizer.json").unlink()
        Path(name, "config.json").write_text(
            json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True})
        )
    config = recipe("seme")
    merge(config, "whole", threads=1)
    stopped(5, monkeypatch, OSError(errno.ENOSPC, "No space left on device"), config, memory=None)
    assert merge(config, "out", threads=1, resume=True).bytes_written < merge(config, "again", threads=1).bytes_written
    found, expected = contents(Path("out")), contents(Path("whole"))
    assert found.keys() == expected.keys()
    assert "merge_report.json" in found
    assert found == expected


class TestRefused:
    """Another merge is not gone on with, and what there is of the first stays."""

    @pytest.fixture
    def unfinished(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        stopped(5, monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
        return models

    def refused(self, message: str, config: dict[str, Any] | None = None, **options: Any) -> None:
        left = Path(".out.seme-journal").read_bytes()
        with pytest.raises(TargetError, match=message):
            merge(config or recipe(), "out", resume=True, **options)
        assert Path(".out.seme-journal").read_bytes() == left
        assert Path(".out.seme-staging/model.safetensors").exists()

    def test_another_recipe(self, unfinished: Path) -> None:
        self.refused("cannot be resumed: the recipe is another one", recipe(weight=0.4))

    def test_another_seed(self, unfinished: Path) -> None:
        self.refused("the recipe is another one, or --seed or --compat", seed=3)

    def test_other_options(self, unfinished: Path) -> None:
        self.refused("it ran with --nonfinite error", nonfinite="keep")
        self.refused("has other tensors or shards", out_shard_size="500KB")

    def test_an_input_of_another_time(self, unfinished: Path) -> None:
        os.utime("m1/model.safetensors", ns=(0, 5))
        self.refused(r"m1/model.safetensors: its time of last change \(ns\) was \d+ and is 5")

    def test_an_input_of_another_size(self, unfinished: Path) -> None:
        Path("m2/config.json").write_text("{}")
        self.refused(r"m2/config.json: its size was \d+ and is 2")

    def test_an_input_of_another_header(self, unfinished: Path) -> None:
        file = Path("m1/model.safetensors")
        state = file.stat()
        # Two tensors change places: neither the size nor the time of the file is another one.
        raw = file.read_bytes()
        raw = raw.replace(b"layers.0", b"layers.X").replace(b"layers.1", b"layers.0")
        file.write_bytes(raw.replace(b"layers.X", b"layers.1"))
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        self.refused("m1/model.safetensors: its header was")

    def test_other_numerics(self, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resuming, "NUMERICS", resuming.NUMERICS + 1)
        self.refused(r"seme [\d.]+ computed other values than seme")

    def test_a_staging_folder_that_is_not_as_it_was(self, unfinished: Path) -> None:
        os.truncate(".out.seme-staging/model.safetensors", 100)
        with pytest.raises(TargetError, match="is not as the unfinished merge left it"):
            merge(recipe(), "out", resume=True)

    def test_without_resume_it_starts_over(self, unfinished: Path) -> None:
        result = merge(recipe(weight=0.4), "out")
        assert result.bytes_written == 2 * sum(300 * 700 if len(s) == 2 else 700 for s in SHAPES.values())
        assert not [p for p in os.listdir() if p.startswith(".")]


def test_with_nothing_to_resume_it_is_a_merge(models: Path) -> None:
    merge(recipe(), "out", resume=True)
    merge(recipe(), "whole")
    assert contents(Path("out")) == contents(Path("whole"))
    with pytest.raises(TargetError, match="not empty"):
        merge(recipe(), "out", resume=True)


def test_several_documents_are_not_resumed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = recipe("linear"), recipe("linear")
    second["models"][0]["model"] = "step"
    Path("r.yml").write_text(json.dumps({"name": "step", **first}) + "\n---\n" + json.dumps(second))
    assert main(["merge", "r.yml", "out", "--resume"]) == 2
    assert "resume: the recipe has 2 documents" in capsys.readouterr().err
    assert main(["merge", "r.yml", "out", "--quiet"]) == 0


def test_an_interrupt_keeps_what_is_merged(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(6, monkeypatch, KeyboardInterrupt())

    def check(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(resuming, "check_unchanged", check)
        with pytest.raises(KeptInterrupt):
            merge(recipe(), "out", resume=True)
    assert merge(recipe(), "out", resume=True).bytes_written == 0


def test_a_mistake_keeps_nothing(models: Path) -> None:
    tensors = load_file("m2/model.safetensors")
    tensors["model.layers.5.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, "m2/model.safetensors")
    with pytest.raises(CheckpointError, match="inf or NaN"):
        merge(recipe("linear"), "out", threads=1)
    assert sorted(os.listdir()) == ["m0", "m1", "m2"]


class TestOrder:
    """What a power cut may find on disk: never a journal ahead of its data, never a model ahead of its files."""

    @pytest.fixture
    def calls(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []

        def traced(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def call(first: Any, *args: Any) -> Any:
                path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
                text = bytes(args[0][:1]).decode("latin-1") if name == "write" else ""
                found.append((name + text, Path(path).name))
                return real(first, *args)

            return call

        for name in ("pwrite", "write", "fsync", "fdatasync", "rename"):
            monkeypatch.setattr(os, name, traced(name))
        return found

    def test_data_before_journal_before_rename(
        self, calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writing, "SYNC_EVERY_S", 0.0)
        merge(recipe("linear"), "out", threads=1, memory="1MiB")
        shard, journal = "model.safetensors", ".out.seme-journal"
        at = {call: [i for i, c in enumerate(calls) if c == call] for call in set(calls)}
        marks = at["writes", journal]
        assert marks
        for mark in marks:  # a line "s": the shard synced before it, the journal after it
            syncs = [i for i in at["fsync", shard] if i < mark]
            wrote = [i for i in at["writew", journal] if syncs and i < syncs[-1]]
            assert syncs
            assert wrote
            assert any(i > mark for i in at["fdatasync", journal])
        for n, line in enumerate(at["writew", journal]):  # each after its data; the first pwrite is the header
            assert sum(i < line for i in at["pwrite", shard]) > n + 1
        rename = at["rename", ".out.seme-staging"][0]
        commit = at["writec", journal][0]
        assert max(at["pwrite", shard]) < max(i for i in at["fsync", shard]) < commit < rename
        assert commit < max(at["fdatasync", journal]) < rename
        for name in ("config.json", "tokenizer.json", "README.md", "seme_config.yml", ".out.seme-staging"):
            assert max(at["fsync", name]) < commit
        assert rename < max(i for i, c in enumerate(calls) if c[0] == "fsync")  # the folder above

    def test_after_a_power_cut_only_what_was_synced_counts(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import seme.checkpoint.journal as journal

        monkeypatch.setattr(writing, "SYNC_EVERY_S", 1e9)
        stopped(6, monkeypatch, OSError(errno.EIO, "Input/output error"))
        file = beside(Path("out"), "journal")
        found = Journal.read(file)
        assert found is not None
        assert found.done
        monkeypatch.setattr(journal, "boot", lambda: "another")
        found = Journal.read(file)
        assert found is not None
        assert not found.done
        with open(file, "ab") as f:
            f.write(b"s %d\n" % file.stat().st_size + bytes(50))  # and rubbish where the disk had not written
        found = Journal.read(file)
        assert found is not None
        assert found.done
        # What is not believed is gone from the journal, so that a later mark does not cover it.
        file.write_bytes(b"\n".join(x for x in file.read_bytes().split(b"\n") if x[:1] in b"{w" and x) + b"\n")
        merge(recipe(), "whole")
        result = merge(recipe(), "out", resume=True)
        assert result.bytes_written == sum(2 * t.numel() for t in load_file("out/model.safetensors").values())
        assert contents(Path("out")) == contents(Path("whole"))

    def test_data_that_could_not_be_synced_are_not_believed(
        self, models: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fsync(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as m:
            m.setattr(writing, "_fsync", fsync)
            with pytest.raises(TargetError, match="out: cannot be completed: Input/output error") as e:
                merge(recipe(), "out")
        assert e.value.fault
        assert sorted(os.listdir()) == ["m0", "m1", "m2"]


class TestFaults:
    """The machine fails: one line that names the file, exit code 1, the target untouched, the work kept."""

    def run(self, command: list[str], prepare: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
        Path("recipe.yml").write_text(json.dumps(recipe()))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, preexec_fn=prepare)

    def command(self, *more: str, prepare: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "seme", "merge", "recipe.yml", "out", "--threads", "1", *more]
        return self.run(command, prepare)

    @pytest.fixture
    def disk(self, models: Path) -> Iterator[Path]:
        """A file system of 3 MiB."""
        disk = models / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no permission to mount a small file system")
        try:
            yield disk
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def one_line(self, run: subprocess.CompletedProcess[str], *parts: str) -> None:
        assert run.returncode == 1, run.stderr
        lines = run.stderr.strip().split("\n")
        assert len(lines) == 1
        assert lines[0].startswith("seme: error: ")
        for part in parts:
            assert part in lines[0]
        assert not Path("out").exists()

    def test_a_file_may_not_be_so_large(self, models: Path) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

        self.one_line(self.command(prepare=limit), "model.safetensors", "File too large")

    def test_too_little_memory(self, models: Path) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_STACK, (1 << 30, resource.getrlimit(resource.RLIMIT_STACK)[1]))
            resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

        # The stack of a worker takes all that the process may have.
        run = self.command(prepare=limit)
        self.one_line(run, "out: memory ran out; allow the process more, or give less to --memory and --threads")

    def test_a_full_disk(self, disk: Path) -> None:
        (disk / "other").write_bytes(bytes(1 << 20))
        run = self.run([sys.executable, "-m", "seme", "merge", "recipe.yml", str(disk / "out")])
        self.one_line(run, str(disk / "out"), "the output needs 2.5 MB", "make room")
        assert os.listdir(disk) == ["other"]

    def test_a_disk_that_fills_up_meanwhile(self, models: Path, disk: Path) -> None:
        program = (
            "import os, sys\n"
            "from seme import cli, merging\n"
            "real = merging.model_card\n"
            "def fill(*args):\n"
            "    with open(os.path.dirname(sys.argv[-1]) + '/filler', 'wb', buffering=0) as f:\n"
            "        while True:\n"
            "            try: f.write(bytes(4096))\n"
            "            except OSError: return real(*args)\n"
            "merging.model_card = fill\n"
            "sys.exit(cli.main(sys.argv[1:]))\n"
        )
        out = disk / "out"
        run = self.run([sys.executable, "-c", program, "merge", "recipe.yml", str(out)])
        self.one_line(run, ".out.seme-staging/README.md: write failed: No space left on device", "--resume")
        assert not out.exists()
        (disk / "filler").unlink()
        result = merge(recipe(), out, resume=True)
        assert result.bytes_written == 0
        merge(recipe(), "whole")
        assert contents(out) == contents(Path("whole"))

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
    def test_a_write_that_fails(self, number: int, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stopped(6, monkeypatch, OSError(number, os.strerror(number)))
        assert not Path("out").exists()
        merge(recipe(), "out", resume=True)
        merge(recipe(), "whole")
        assert contents(Path("out")) == contents(Path("whole"))

    def test_the_message_says_how_to_go_on(
        self, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("recipe.yml").write_text(json.dumps(recipe()))
        with monkeypatch.context() as m:
            failing(m, "pwrite", 9, OSError(errno.ENOSPC, "No space left on device"))
            assert main(["merge", "recipe.yml", "out", "--threads", "1", "--memory", "1MiB"]) == 1
        said = capsys.readouterr().err
        assert "model.safetensors: write failed: No space left on device; " in said
        assert said.endswith("what is merged is kept, go on with --resume\n")
        assert main(["merge", "recipe.yml", "out", "--memory", "1MiB", "--resume", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["bytes_written"] < 2_521_400

    def test_a_read_that_fails(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as m:
            failing(m, "preadv", 21, OSError(errno.EIO, "Input/output error"))
            with pytest.raises(
                CheckpointError, match=r"m\d/model.safetensors: tensor .*: read failed: .*--resume"
            ) as e:
                merge(recipe("linear"), "out", threads=1, memory="1MiB")
        assert e.value.fault
        merge(recipe("linear"), "out", resume=True)

    def test_an_input_that_changes_meanwhile(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = Writer.index

        def index(self: Writer) -> None:
            real(self)
            os.utime("m1/model.safetensors", ns=(0, 7))

        monkeypatch.setattr(Writer, "index", index)
        with pytest.raises(CheckpointError, match=r"m1/model.safetensors: its time .* changed while it was merged"):
            merge(recipe(), "out")
        assert sorted(os.listdir()) == ["m0", "m1", "m2"]

    def test_an_input_that_vanishes(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = Checkpoint.read_into

        def read_into(self: Checkpoint, *args: Any) -> None:
            Path("m1/model.safetensors").unlink(missing_ok=True)
            real(self, *args)

        monkeypatch.setattr(Checkpoint, "read_into", read_into)
        with pytest.raises(CheckpointError, match=r"m1/model.safetensors: .*No such file") as e:
            merge(recipe(), "out", threads=1)
        assert e.value.fault
        assert not Path("out").exists()

    def test_a_target_that_came_meanwhile_loses_no_work(self, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = Writer.index

        def index(self: Writer) -> None:
            real(self)
            Path("out").mkdir()
            Path("out/notes.txt").write_text("mine")

        with monkeypatch.context() as m:
            m.setattr(Writer, "index", index)
            with pytest.raises(TargetError, match=r"out: cannot be completed: .*--resume"):
                merge(recipe(), "out")
        assert Path("out/notes.txt").read_text() == "mine"
        Path("out/notes.txt").unlink()
        assert merge(recipe(), "out", resume=True).bytes_written == 0


def test_sigterm_keeps_what_is_merged(models: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from seme.cli import main\n"
        "real, calls = os.pwrite, []\n"
        "def pwrite(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 6: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(*args)\n"
        "os.pwrite = pwrite\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    Path("recipe.yml").write_text(json.dumps(recipe()))
    arguments = ["merge", "recipe.yml", "out", "--threads", "1", "--memory", "1MiB"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode == 0:
        pytest.skip("all was merged before the signal arrived")
    assert run.returncode == 128 + signal.SIGTERM
    assert run.stderr.endswith("interrupted by SIGTERM; what is merged is kept, go on with --resume\n")
    assert main([*arguments, "--resume", "--quiet"]) == 0
