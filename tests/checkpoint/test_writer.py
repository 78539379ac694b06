"""seme/checkpoint/writer.py: shards as the library reads them, and a target that is old or new, never half."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from seme import dtypes
from seme.checkpoint import Layout, Writer, check_free, layout
from seme.errors import TargetError

LISTED = [
    ("embed", dtypes.bfloat16, (7, 3)),
    ("mask", dtypes.BY_NAME["bool"], (5,)),
    ("norm", dtypes.float32, (9,)),
    ("empty", dtypes.float16, (0, 4)),
    ("scalar", dtypes.float64, ()),
    ("ids", dtypes.BY_NAME["int64"], (2,)),
]


def content(name: str, nbytes: int) -> bytes:
    return bytes((len(name) + i) % 2 for i in range(nbytes))


def fill(writer: Writer) -> None:
    for name, dtype, shape in LISTED:
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        data = memoryview(content(name, nbytes))
        writer.write(name, nbytes // 2, data[nbytes // 2 :])
        writer.write(name, 0, data[: nbytes // 2])


def merge(target: Path, overwrite: bool = False, max_shard: int = 10**9) -> None:
    with Writer(target, layout(LISTED, max_shard), overwrite) as writer:
        fill(writer)
        writer.index()
        writer.json("config.json", {"new": True})
        writer.commit()


def old_model(target: Path) -> dict[str, bytes]:
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"old")
    (target / "extra.txt").write_bytes(b"kept until the new one is complete")
    return snapshot(target)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("max_shard", [1, 40, 60, 10**9])
def test_the_library_reads_what_was_written(max_shard: int, tmp_path: Path) -> None:
    merge(tmp_path / "out", max_shard=max_shard)
    plan = layout(LISTED, max_shard)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert names(tmp_path / "out") == {*plan.files, "config.json"} | ({index.name} if len(plan.files) > 1 else set())
    where = {}
    for file in plan.files:
        with safetensors.safe_open(tmp_path / "out" / file, "pt") as f:
            where.update(dict.fromkeys(f.keys(), file))
            for name in f.keys():  # noqa: SIM118 (an open file is not iterable)
                tensor = f.get_tensor(name)
                listed = {n: (d.to_torch(), s) for n, d, s in LISTED}[name]
                assert (tensor.dtype, tuple(tensor.shape)) == listed
                if tensor.numel():
                    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                    assert raw == content(name, len(raw))
    assert where.keys() == {name for name, _, _ in LISTED}
    if len(plan.files) > 1:
        written = json.loads(index.read_text())
        assert written["weight_map"] == where
        assert written["metadata"] == {"total_size": sum(len(content(n, d.itemsize * torch.Size(s).numel())) for n, d, s in LISTED)}  # fmt: skip # noqa: E501


class TestLayout:
    def test_every_tensor_is_aligned_to_its_elements(self) -> None:
        for max_shard in (1, 40, 60, 10**9):
            found = layout(LISTED, max_shard)
            for name, dtype, _ in LISTED:
                assert found.slots[name].offset % dtype.itemsize == 0, name

    def test_a_shard_is_closed_when_the_next_tensor_would_pass_the_limit(self) -> None:
        four = [(name, dtypes.float32, (10,)) for name in "abcd"]
        shards = {limit: [s.shard for s in layout(four, limit).slots.values()] for limit in (39, 40, 79, 80, 120, 160)}
        assert shards == {
            39: [0, 1, 2, 3],
            40: [0, 1, 2, 3],
            79: [0, 1, 2, 3],
            80: [0, 0, 1, 1],
            120: [0, 0, 0, 1],
            160: [0, 0, 0, 0],
        }

    def test_names_sizes_and_total(self) -> None:
        one, three = layout(LISTED, 10**9), layout(LISTED, 45)
        assert one.files == ("model.safetensors",)
        assert one.total_size == three.total_size == 42 + 5 + 36 + 8 + 16
        assert three.files == tuple(f"model-{i:05d}-of-{len(three.files):05d}.safetensors" for i in range(1, len(three.files) + 1))  # fmt: skip # noqa: E501
        assert sum(one.sizes) == one.total_size + len(one.headers[0])

    def test_no_tensor_lies_on_another(self) -> None:
        for max_shard in (40, 10**9):
            found = layout(LISTED, max_shard)
            at = dict(enumerate(map(len, found.headers)))
            sizes = {name: d.itemsize * torch.Size(s).numel() for name, d, s in LISTED}
            for name, slot in sorted(found.slots.items(), key=lambda item: (item[1].offset, sizes[item[0]])):
                assert slot.offset == at[slot.shard]
                at[slot.shard] += sizes[name]
            assert tuple(at.values()) == found.sizes


class TestNothingRemainsWithoutCommit:
    def test_after_leaving(self, tmp_path: Path) -> None:
        with Writer(tmp_path / "out", layout(LISTED, 40)) as writer:
            fill(writer)
            assert not (tmp_path / "out").exists()
            assert writer.staging.is_dir()
        assert names(tmp_path) == set()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
    def test_after_an_exception(self, error: type[BaseException], tmp_path: Path) -> None:
        with pytest.raises(error), Writer(tmp_path / "out", layout(LISTED, 40)):
            raise error
        assert names(tmp_path) == set()

    def test_nor_of_the_folders_made_above_it(self, tmp_path: Path) -> None:
        (tmp_path / "kept").mkdir()
        with Writer(tmp_path / "kept" / "new" / "newer" / "out", layout(LISTED, 40)):
            assert names(tmp_path / "kept" / "new" / "newer") > set()
        assert names(tmp_path) == {"kept"}
        assert names(tmp_path / "kept") == set()

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_when_a_file_cannot_be_allocated(
        self, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(os, "posix_fallocate", fail)
        expected = TargetError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as e:
            Writer(tmp_path / "out", layout(LISTED, 40))
        if expected is TargetError:
            shard = tmp_path / ".out.seme-staging" / "model-00001-of-00004.safetensors"
            said = f"{shard} of 146 B: No space left on device; choose another output folder or free the space"
            assert str(e.value) == said
        assert names(tmp_path) == set()

    def test_and_a_merge_that_was_killed_is_swept_up_by_the_next(self, tmp_path: Path) -> None:
        code = (
            "import os, sys; from pathlib import Path; from seme.checkpoint import Writer, layout\n"
            "from seme.dtypes import float32\n"
            "writer = Writer(Path(sys.argv[1]), layout([('other', float32, (4,))], 1)); writer.json('stale.json', {})\n"
            "os.kill(os.getpid(), 9)"
        )
        root = Path(__file__).resolve().parents[2]
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], cwd=root, check=False)
        assert (tmp_path / ".out.seme-staging" / "stale.json").exists()
        merge(tmp_path / "out")
        assert names(tmp_path) == {"out"}
        assert names(tmp_path / "out") == {"model.safetensors", "config.json"}

    def test_and_no_file_is_open_while_it_is_removed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real, held = shutil.rmtree, []

        def rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
            links = (Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
            held.extend(os.readlink(link) for link in links if link.exists() and str(tmp_path) in os.readlink(link))
            real(path, *args, **kwargs)

        with Writer(tmp_path / "out", layout(LISTED, 40)) as writer:
            fill(writer)
            monkeypatch.setattr(shutil, "rmtree", rmtree)
        assert [file for file in held if file.endswith(".safetensors")] == []  # the lock is held all along
        assert names(tmp_path) == set()

    def test_what_resists_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def rmtree(*_: Any, **__: Any) -> None:
            raise OSError(errno.EACCES, "Permission denied")

        writer = Writer(tmp_path / "out", layout(LISTED, 40))
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        with pytest.warns(
            UserWarning, match="out.seme-staging: cannot be removed: Permission denied; delete it by hand"
        ):
            writer.abort()
        assert names(tmp_path) == {".out.seme-staging"}

    def test_when_interrupted_again_meanwhile(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = shutil.rmtree

        def rmtree(*args: Any, **kwargs: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            real(*args, **kwargs)
            signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "new" / "out", layout(LISTED, 40)):
            raise RuntimeError
        assert names(tmp_path) == set()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_in_another_thread(self, tmp_path: Path) -> None:
        def work() -> None:
            merge(tmp_path / "out")
            Writer(tmp_path / "other", layout(LISTED, 40)).abort()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert names(tmp_path) == {"out"}


class TestLock:
    def test_a_second_merge_to_the_same_target_is_refused(self, tmp_path: Path) -> None:
        message = rf"^{tmp_path / 'out'}: another merge is writing to it; wait for it or choose another folder$"
        with Writer(tmp_path / "out", layout(LISTED, 40)) as writer:
            fill(writer)
            with pytest.raises(TargetError, match=message):
                Writer(tmp_path / "out", layout(LISTED, 10**9))
            Writer(tmp_path / "other", layout(LISTED, 40)).abort()
            writer.commit()
            with pytest.raises(TargetError, match=message):  # not before the first has let go
                Writer(tmp_path / "out", layout(LISTED, 40), overwrite=True)
        assert names(tmp_path) == {"out"}
        assert names(tmp_path / "out") == set(layout(LISTED, 40).files)

    def test_from_another_process(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from seme.checkpoint import Writer, layout\n"
            "try: Writer(Path(sys.argv[1]), layout([], 1))\n"
            "except Exception as e: print(e)"
        )
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-c", code, str(tmp_path / "out")]
        with Writer(tmp_path / "out", layout(LISTED, 40)) as writer:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
            assert done.stdout.endswith("another merge is writing to it; wait for it or choose another folder\n")
            assert names(writer.staging) == set(layout(LISTED, 40).files)

    def test_a_lock_that_its_holder_removed_meanwhile_is_no_lock(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / ".out.seme-lock"
        real, calls = fcntl.flock, []

        def flock(descriptor: int, operation: int) -> None:
            if not calls:  # the holder lets go between our opening and our locking
                file.unlink()
            calls.append(descriptor)
            real(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        with Writer(tmp_path / "out", layout(LISTED, 40)):
            assert len(calls) == 2
            assert file.exists()

    def test_a_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def flock(*_: Any) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", flock)
        merge(tmp_path / "out")
        assert names(tmp_path) == {"out"}


class TestCommit:
    def test_everything_is_on_disk_before_the_name_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        real_fsync, real_rename = os.fsync, Path.rename

        def fsync(descriptor: int) -> None:
            calls.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            real_fsync(descriptor)

        def rename(self: Path, target: Path) -> Path:
            calls.append(f"rename {self.name} {target.name}")
            return real_rename(self, target)

        old_model(tmp_path / "out")
        (tmp_path / "templates").mkdir()
        (tmp_path / "templates" / "chat.jinja").write_text("x")
        with Writer(tmp_path / "out", layout(LISTED, 60), overwrite=True) as writer:
            fill(writer)
            writer.index()
            writer.text("README.md", "# x")
            writer.copy(tmp_path / "templates")
            monkeypatch.setattr(os, "fsync", fsync)
            monkeypatch.setattr(Path, "rename", rename)
            writer.commit()
        *synced, staging, away, into, parent = calls
        files = {*layout(LISTED, 60).files, "model.safetensors.index.json", "README.md", "templates", "chat.jinja"}
        assert set(synced) == {f"sync {name}" for name in files}
        assert staging == "sync .out.seme-staging"
        assert away == "rename out .out.seme-previous"
        assert into == "rename .out.seme-staging out"
        assert parent == f"sync {tmp_path.name}"
        assert names(tmp_path) == {"out", "templates"}

    def test_an_empty_folder_may_be_the_target(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        merge(tmp_path / "out")
        assert (tmp_path / "out" / "model.safetensors").exists()

    def test_modes_follow_the_umask(self, tmp_path: Path) -> None:
        source = tmp_path / "tokenizer.json"
        source.write_text("{}")
        source.chmod(0o400)
        old = os.umask(0o027)
        try:
            with Writer(tmp_path / "out", layout(LISTED, 40)) as writer:
                fill(writer)
                writer.index()
                writer.copy(source)
                writer.commit()
        finally:
            os.umask(old)
        modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
        assert modes == {0o640}
        assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750

    def test_without_overwrite_a_folder_with_something_in_it_is_left_alone(self, tmp_path: Path) -> None:
        before = old_model(tmp_path / "out")
        with pytest.raises(TargetError, match=r"out: not empty; choose another folder or pass --overwrite$"):
            Writer(tmp_path / "out", layout(LISTED, 40))
        assert snapshot(tmp_path / "out") == before
        assert names(tmp_path) == {"out"}

    def test_nor_one_that_filled_while_merging(self, tmp_path: Path) -> None:
        with Writer(tmp_path / "out", layout(LISTED, 40)) as writer:
            fill(writer)
            before = old_model(tmp_path / "out")
            with pytest.raises(TargetError, match=r"out: cannot be completed: Directory not empty$"):
                writer.commit()
        assert snapshot(tmp_path / "out") == before
        assert names(tmp_path) == {"out"}


class TestOverwrite:
    def test_the_old_model_is_there_until_the_new_one_is_complete(self, tmp_path: Path) -> None:
        before = old_model(tmp_path / "out")
        with Writer(tmp_path / "out", layout(LISTED, 40), overwrite=True) as writer:
            fill(writer)
            assert snapshot(tmp_path / "out") == before
            writer.commit()
        assert names(tmp_path / "out") == set(layout(LISTED, 40).files)
        assert names(tmp_path) == {"out"}

    def test_and_after_a_merge_that_failed(self, tmp_path: Path) -> None:
        before = old_model(tmp_path / "out")
        with pytest.raises(RuntimeError), Writer(tmp_path / "out", layout(LISTED, 40), overwrite=True):
            raise RuntimeError
        assert snapshot(tmp_path / "out") == before
        assert names(tmp_path) == {"out"}

    @pytest.mark.parametrize("step", ["fsync", "rename away", "rename into"])
    def test_and_after_a_commit_that_failed(self, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = old_model(tmp_path / "out")
        real: Callable[..., Any] = Path.rename

        def fsync(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        def rename(self: Path, target: Path) -> Any:
            if self.name == ("out" if step == "rename away" else ".out.seme-staging"):
                raise OSError(errno.EIO, "Input/output error")
            return real(self, target)

        with Writer(tmp_path / "out", layout(LISTED, 40), overwrite=True) as writer:
            fill(writer)
            if step == "fsync":
                monkeypatch.setattr(os, "fsync", fsync)
            else:
                monkeypatch.setattr(Path, "rename", rename)
            with pytest.raises(TargetError, match=r"out: cannot be completed: Input/output error$"):
                writer.commit()
        assert snapshot(tmp_path / "out") == before
        assert names(tmp_path) == {"out"}

    @pytest.mark.parametrize("step", ["before rename away", "after rename away", "before rename into"])
    def test_and_after_a_commit_that_was_interrupted(
        self, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = old_model(tmp_path / "out")
        real: Callable[..., Any] = Path.rename

        def rename(self: Path, target: Path) -> Any:
            if self.name == (".out.seme-staging" if step == "before rename into" else "out"):
                if step.startswith("after"):
                    real(self, target)
                raise KeyboardInterrupt
            return real(self, target)

        with Writer(tmp_path / "out", layout(LISTED, 40), overwrite=True) as writer:
            fill(writer)
            monkeypatch.setattr(Path, "rename", rename)
            with pytest.raises(KeyboardInterrupt):
                writer.commit()
        assert snapshot(tmp_path / "out") == before
        assert names(tmp_path) == {"out"}

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_waits_until_the_new_one_is_in_place_and_the_old_one_gone(
        self, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        real: Callable[..., Any] = Path.rename
        remove = shutil.rmtree

        def rename(self: Path, target: Path) -> None:
            signal.raise_signal(number)
            real(self, target)
            signal.raise_signal(number)

        def rmtree(*args: Any, **kwargs: Any) -> None:
            signal.raise_signal(number)
            remove(*args, **kwargs)

        old_model(tmp_path / "out")
        handler = signal.signal(number, stop)
        try:
            with Writer(tmp_path / "out", layout(LISTED, 40), overwrite=True) as writer:
                fill(writer)
                monkeypatch.setattr(Path, "rename", rename)
                monkeypatch.setattr(shutil, "rmtree", rmtree)
                with pytest.raises(KeyboardInterrupt):
                    writer.commit()
            assert signal.getsignal(number) is stop
        finally:
            signal.signal(number, handler)
        assert names(tmp_path / "out") == set(layout(LISTED, 40).files)
        assert names(tmp_path) == {"out"}

    def test_an_old_model_that_resists_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def rmtree(*_: Any, **__: Any) -> None:
            raise OSError(errno.EACCES, "Permission denied")

        old_model(tmp_path / "out")
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        with pytest.warns(UserWarning, match="out.seme-previous: cannot be removed: Permission denied; delete it"):
            merge(tmp_path / "out", overwrite=True)
        assert names(tmp_path / "out") == {"model.safetensors", "config.json"}

    def test_a_commit_cut_off_between_its_renames_is_taken_back(self, tmp_path: Path) -> None:
        before = old_model(tmp_path / ".out.seme-previous")
        with pytest.raises(TargetError, match="not empty"):
            Writer(tmp_path / "out", layout(LISTED, 40))
        assert snapshot(tmp_path / "out") == before
        assert names(tmp_path) == {"out"}

    def test_what_an_earlier_overwrite_left_is_swept_up(self, tmp_path: Path) -> None:
        old_model(tmp_path / "out")
        old_model(tmp_path / ".out.seme-previous")
        merge(tmp_path / "out", overwrite=True)
        assert names(tmp_path) == {"out"}
        assert "extra.txt" not in names(tmp_path / "out")

    @pytest.mark.parametrize(
        "file",
        [
            "config.json",
            "seme_config.yml",
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        ],
    )
    def test_a_folder_with_any_file_of_a_model_is_one(self, file: str, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / file).touch()
        merge(tmp_path / "out", overwrite=True)
        assert names(tmp_path / "out") == {"model.safetensors", "config.json"}

    def test_other_folders_are_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        for file in ("thesis.tex", "notes.json", "lora.safetensors", "data.bin"):
            (tmp_path / "out" / file).write_text("x")
        before = snapshot(tmp_path / "out")
        with pytest.raises(TargetError, match=r"out: not a model \(no .*\), --overwrite replaces nothing else; choose"):
            Writer(tmp_path / "out", layout(LISTED, 40), overwrite=True)
        assert snapshot(tmp_path / "out") == before
        assert names(tmp_path) == {"out"}

    def test_nor_one_that_took_the_place_while_merging(self, tmp_path: Path) -> None:
        with Writer(tmp_path / "out", layout(LISTED, 40), overwrite=True) as writer:
            fill(writer)
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").write_text("x")
            with pytest.raises(TargetError, match="out: not a model"):
                writer.commit()
        assert names(tmp_path / "out") == {"thesis.tex"}
        assert names(tmp_path) == {"out"}

    @pytest.mark.parametrize("inside", ["", "deep/inside"])
    @pytest.mark.parametrize("what", ["working", "home"])
    def test_nor_where_one_works_or_lives(
        self, what: str, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = old_model(tmp_path / "out")
        (tmp_path / "out" / inside).mkdir(parents=True, exist_ok=True)
        if what == "working":
            monkeypatch.chdir(tmp_path / "out" / inside)
        else:
            monkeypatch.setenv("HOME", str(tmp_path / "out" / inside))
        with pytest.raises(TargetError, match=f"out: is or holds the {what} directory, which is never replaced"):
            Writer(tmp_path / "out", layout(LISTED, 40), overwrite=True)
        assert snapshot(tmp_path / "out") == before


class TestTargets:
    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("x")
        for overwrite in (False, True):
            with pytest.raises(TargetError, match=r"out: exists and is not a folder$"):
                check_free(tmp_path / "out", overwrite)

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(TargetError, match=r"file: File exists; choose another output folder"):
            Writer(tmp_path / "file" / "out", layout(LISTED, 40))

    def test_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def mkdir(*_: Any, **__: Any) -> None:
            raise OSError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(TargetError, match=r"out: Permission denied; choose another output folder"):
            Writer(tmp_path / "out", layout(LISTED, 40))
        assert names(tmp_path) == set()

    @pytest.mark.parametrize(
        ("number", "remedy"),
        [
            (errno.ENOSPC, "; choose another output folder or free the space"),
            (errno.EDQUOT, "; choose another output folder or free the space"),
            (errno.EROFS, "; choose another output folder"),
            (errno.EMFILE, "; raise the limit with ulimit -n"),
        ],
    )
    def test_the_remedy_is_that_of_the_error(
        self, number: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fallocate(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", fallocate)
        with pytest.raises(TargetError) as e:
            Writer(tmp_path / "out", layout(LISTED, 40))
        shard = tmp_path / ".out.seme-staging" / "model-00001-of-00004.safetensors"
        assert str(e.value) == f"{shard} of 146 B: {os.strerror(number)}{remedy}"

    def test_a_staging_folder_that_is_a_link(self, tmp_path: Path) -> None:
        before = old_model(tmp_path / "elsewhere")
        (tmp_path / ".out.seme-staging").symlink_to("elsewhere")
        with pytest.raises(
            TargetError, match=r"out: Cannot call rmtree on a symbolic link; choose another output folder$"
        ):
            Writer(tmp_path / "out", layout(LISTED, 40))
        assert snapshot(tmp_path / "elsewhere") == before
        assert names(tmp_path) == {"elsewhere", ".out.seme-staging"}


@pytest.mark.parametrize("most", [1, 13, 4096])
def test_writes_go_on_where_a_call_ended(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One call takes at most 2 GiB; this is the same with a smaller limit.
    merge(tmp_path / "whole")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:most], offset))
    merge(tmp_path / "pieces")
    assert snapshot(tmp_path / "pieces") == snapshot(tmp_path / "whole")


def test_a_write_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Writer(tmp_path / "out", layout(LISTED, 10**9)) as writer:
        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(TargetError, match=r"model.safetensors: write failed: No space left on device; choose"):
            fill(writer)
        (writer.staging / "a.txt").mkdir()
        with pytest.raises(TargetError, match=r"a.txt: write failed: "):
            writer.text("a.txt", "x")
        with pytest.raises(TargetError, match=r"^no/such/file: cannot be copied to "):
            writer.copy(Path("no/such/file"))


def test_files_of_full_size_from_the_start(tmp_path: Path) -> None:
    plan: Layout = layout([("x", dtypes.float32, (1 << 20,))], 10**9)
    with Writer(tmp_path / "out", plan) as writer:
        found = (writer.staging / "model.safetensors").stat()
        assert found.st_size == plan.sizes[0]
        assert found.st_blocks * 512 >= plan.sizes[0]  # reserved, not only announced


def test_text_that_is_not_ascii(tmp_path: Path) -> None:
    with Writer(tmp_path / "out", layout(LISTED, 10**9)) as writer:
        fill(writer)
        writer.json("config.json", {"wörter": "層", "lone": "\ud800"})
        writer.text("README.md", "# wörter")
        writer.commit()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"wörter": "層", "lone": "\ud800"}
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "# wörter"
