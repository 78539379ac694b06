"""seme/checkpoint/reader.py and index.py: checkpoints of every layout, and their bytes by ranges."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from seme.checkpoint import Checkpoint
from seme.checkpoint.index import read_json
from seme.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(35, dtype=torch.float32).reshape(5, 7),
    "b.weight": torch.randn(1023, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "ids": torch.arange(9),
    "mask": torch.tensor([True, False, True]),
}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def read(checkpoint: Checkpoint, name: str, start: int = 0, end: int | None = None) -> bytes:
    tensor = checkpoint.tensors[name]
    buffer = bytearray(b"\xff" * ((tensor.nbytes if end is None else end) - start))
    checkpoint.read_into(tensor, start, memoryview(buffer))
    return bytes(buffer)


def write_index(folder: Path, name: str, weight_map: Any) -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def in_shards(folder: Path, suffix: str = "safetensors") -> dict[str, str]:
    stem, save = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    weight_map = {}
    for i in range(3):
        file = f"{stem}-{i + 1:05d}-of-00003.{suffix}"
        part = dict(list(TENSORS.items())[i::3])
        save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    write_index(folder, f"{stem}.{suffix}.index.json", weight_map)
    return weight_map


def lay_out(folder: Path, layout: str) -> Path:
    """The tensors as a checkpoint of that layout."""
    if layout == "single":
        save_file(TENSORS, folder / "model.safetensors")
    elif layout == "shards":
        in_shards(folder)
    elif layout == "bin":
        torch.save(TENSORS, folder / "pytorch_model.bin")
    elif layout == "bin shards":
        in_shards(folder, "bin")
    elif layout == "old bin":
        torch.save(TENSORS, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif layout == "trainer":
        torch.save({"state_dict": TENSORS, "epoch": 3}, folder / "pytorch_model.bin")
    elif layout == "file":
        save_file(TENSORS, folder / "anything.safetensors")
        return folder / "anything.safetensors"
    elif layout == "bin file":
        torch.save(TENSORS, folder / "anything.pt")
        return folder / "anything.pt"
    return folder


LAYOUTS = ["single", "shards", "bin", "bin shards", "old bin", "trainer", "file", "bin file"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(layout: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with Checkpoint(lay_out(tmp_path, layout)) as checkpoint:
        assert checkpoint.path == tmp_path
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.tensors.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            stored = checkpoint.tensors[name]
            assert (stored.dtype.to_torch(), stored.shape) == (tensor.dtype, tuple(tensor.shape))
            assert (stored.numel, stored.nbytes) == (tensor.numel(), tensor.numel() * tensor.element_size())
            if tensor.numel():
                assert read(checkpoint, name) == raw(tensor), name


@pytest.mark.parametrize("layout", ["single", "bin"])
def test_ranges(layout: str, tmp_path: Path) -> None:
    with Checkpoint(lay_out(tmp_path, layout)) as checkpoint:
        for start, end in [(0, 2), (2, 2046), (1000, 1002), (2044, 2046)]:
            assert read(checkpoint, "b.weight", start, end) == raw(TENSORS["b.weight"])[start:end]


def test_tensors_of_a_pickle_may_be_strided(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    torch.save({"t": whole.t(), "slice": whole[1:3, ::2], "expanded": whole[0, :1].expand(5)}, tmp_path / "x.bin")
    with Checkpoint(tmp_path / "x.bin") as checkpoint:
        assert read(checkpoint, "t", 8, 40) == raw(whole.t())[8:40]
        assert read(checkpoint, "slice") == raw(whole[1:3, ::2])
        assert read(checkpoint, "expanded") == raw(torch.zeros(5))


def test_shared_storage_is_seen(tmp_path: Path) -> None:
    x = torch.arange(6.0)
    torch.save({"a": x, "b": x, "c": x[1:], "d": x.clone()}, tmp_path / "x.bin")
    with Checkpoint(tmp_path / "x.bin") as checkpoint:
        assert checkpoint.memory("a") == checkpoint.memory("b") is not None
        assert checkpoint.memory("a") != checkpoint.memory("c")
        assert checkpoint.memory("a") != checkpoint.memory("d")
        assert checkpoint.memory("none") is None
    with Checkpoint(lay_out(tmp_path, "single")) as checkpoint:
        assert checkpoint.memory("a.weight") is None


def test_the_order_of_search(tmp_path: Path) -> None:
    for layout, expected in [
        ("bin shards", "pytorch_model-00001-of-00003.bin"),
        ("bin", "pytorch_model.bin"),
        ("shards", "model-00001-of-00003.safetensors"),
        ("single", "model.safetensors"),
    ]:
        lay_out(tmp_path, layout)
        with Checkpoint(tmp_path) as checkpoint:
            assert checkpoint.files[0].name == expected


def test_a_shard_may_lie_behind_a_link(tmp_path: Path) -> None:
    # As in the hub's cache.
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    save_file(TENSORS, tmp_path / "blobs" / "0123")
    (tmp_path / "model" / "model.safetensors").symlink_to("../blobs/0123")
    with Checkpoint(tmp_path / "model") as checkpoint:
        assert read(checkpoint, "scalar") == raw(TENSORS["scalar"])


def test_the_index_decides_which_shard_holds_a_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(3)}, tmp_path / "2.safetensors")
    write_index(tmp_path, "model.safetensors.index.json", {"b": "1.safetensors", "a": "2.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        assert read(checkpoint, "a") == raw(torch.ones(3))


@pytest.mark.parametrize("most", [1, 1000, 4096])
def test_reads_go_on_where_a_call_ended(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One call gives at most 2 GiB; this is the same with a smaller limit.
    real = os.preadv
    calls = []

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(descriptor, [buffers[0][:most]], offset)

    with Checkpoint(lay_out(tmp_path, "single")) as checkpoint:
        monkeypatch.setattr(os, "preadv", short)
        assert read(checkpoint, "b.weight") == raw(TENSORS["b.weight"])
    assert len(calls) == -(-2046 // most)


def test_a_file_that_shrinks_while_being_read(tmp_path: Path) -> None:
    with Checkpoint(lay_out(tmp_path, "single")) as checkpoint:
        file = tmp_path / "model.safetensors"
        os.truncate(file, file.stat().st_size - 40)
        last = max(checkpoint.tensors.values(), key=lambda t: t.offset + t.nbytes if t.nbytes else 0)
        with pytest.raises(CheckpointError, match=rf"^{file}: tensor {last.name}: ends \d+ bytes early"):
            read(checkpoint, last.name)


def read_runs(checkpoint: Checkpoint, name: str, runs: list[tuple[int, int, int]], size: int) -> bytes:
    buffer = bytearray(b"\xff" * size)
    starts, places, sizes = (np.array([run[i] for run in runs], dtype=np.int64) for i in range(3))
    checkpoint.read_runs(checkpoint.tensors[name], starts, places, sizes, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("layout", ["single", "bin"])
@pytest.mark.parametrize("compiled", [True, False])
def test_runs_in_any_order(layout: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr("seme.native.why_not", lambda _: "not built")
    with Checkpoint(lay_out(tmp_path, layout)) as checkpoint:
        data = raw(TENSORS["b.weight"])
        runs = [(2040, 0, 6), (0, 10, 2), (500, 12, 700), (2, 6, 2)]
        expected = data[2040:] + data[2:4] + b"\xff\xff" + data[:2] + data[500:1200]
        assert read_runs(checkpoint, "b.weight", runs, 712) == expected
        assert read_runs(checkpoint, "empty", [], 0) == b""


def test_runs_of_a_file_that_shrinks_or_vanishes(tmp_path: Path) -> None:
    with Checkpoint(lay_out(tmp_path, "single")) as checkpoint:
        file = tmp_path / "model.safetensors"
        last = max(checkpoint.tensors.values(), key=lambda t: t.offset + t.nbytes if t.nbytes else 0)
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(CheckpointError, match=rf"^{file}: tensor {last.name}: ends 1 bytes early; was it changed"):
            read_runs(checkpoint, last.name, [(0, 0, 1), (last.nbytes - 2, 1, 2)], 3)
        checkpoint.close()
        file.unlink()
        with pytest.raises(CheckpointError, match=rf"^{file}: tensor ids: read failed: No such file"):
            read_runs(checkpoint, "ids", [(0, 0, 1)], 1)


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    with Checkpoint(lay_out(tmp_path, "single")) as checkpoint:
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model.safetensors: tensor ids: read failed: No such file"):
            read(checkpoint, "ids")


def test_many_threads(tmp_path: Path) -> None:
    x = torch.arange(1 << 20, dtype=torch.int32)
    torch.save({"x": x.reshape(1024, 1024).t()}, tmp_path / "x.bin")
    save_file({"y": x}, tmp_path / "y.safetensors")
    wrong = []
    with Checkpoint(tmp_path / "x.bin") as strided, Checkpoint(tmp_path / "y.safetensors") as plain:
        expected = {"x": raw(x.reshape(1024, 1024).t()), "y": raw(x)}

        def work(k: int) -> None:
            for i in range(k, 64, 8):
                start, end = i << 16, (i + 1) << 16
                for checkpoint, name in ((strided, "x"), (plain, "y")):
                    if read(checkpoint, name, start, end) != expected[name][start:end]:
                        wrong.append((name, i))

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_closing_closes_the_files(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = Checkpoint(lay_out(tmp_path, "shards"))
    read(checkpoint, "ids")
    checkpoint.close()
    checkpoint.close()
    assert len(os.listdir("/proc/self/fd")) == before


class TestWhatIsNoCheckpoint:
    def fails(self, path: Path, message: str) -> None:
        with pytest.raises(CheckpointError) as e:
            Checkpoint(path)
        assert str(e.value).startswith(message), str(e.value)

    def test_nothing_there(self, tmp_path: Path) -> None:
        self.fails(tmp_path / "no", f"{tmp_path / 'no'}: no such folder")

    def test_a_folder_without_weights(self, tmp_path: Path) -> None:
        message = f"{tmp_path}: no model.safetensors or pytorch_model.bin, nor an index of shards"
        self.fails(tmp_path, message)
        (tmp_path / "m.gguf").touch()
        self.fails(tmp_path, message + "; GGUF files are quantised")
        (tmp_path / "adapter_model.safetensors").touch()
        self.fails(tmp_path, message + "; this is a LoRA adapter")

    def test_a_folder_or_file_that_may_not_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lay_out(tmp_path, "single")
        words = ": cannot be read: Permission denied; give yourself the permission (chmod u+rX)"

        def refuse(*args: Any, **options: Any) -> Any:
            raise PermissionError(errno.EACCES, "Permission denied")

        with monkeypatch.context() as m:  # the tests may run as root, who may read all
            m.setattr(Path, "open", refuse)
            self.fails(tmp_path, f"{tmp_path / 'model.safetensors'}{words}")
        monkeypatch.setattr(os, "listdir", refuse)
        self.fails(tmp_path, f"{tmp_path}{words}")

    def test_weights_without_tensors(self, tmp_path: Path) -> None:
        save_file({}, tmp_path / "model.safetensors")
        self.fails(tmp_path, f"{tmp_path}: no tensors in model.safetensors")

    def test_a_pickle_of_something_else(self, tmp_path: Path) -> None:
        file = tmp_path / "pytorch_model.bin"
        for value in (torch.zeros(3), [torch.zeros(3)], {}, 5):
            torch.save(value, file)
            self.fails(tmp_path, f"{tmp_path}: no tensors in pytorch_model.bin")
        torch.save({"a": torch.zeros(3), "step": 5}, file)
        self.fails(tmp_path, f"{file}: entry 'step' is not a dense tensor with a name")
        torch.save({1: torch.zeros(3)}, file)
        self.fails(tmp_path, f"{file}: entry 1 is not a dense tensor with a name")
        torch.save({"a": torch.eye(3).to_sparse()}, file)
        self.fails(tmp_path, f"{file}: entry 'a' is not a dense tensor with a name")
        torch.save({"a": torch.zeros(3, dtype=torch.complex128)}, file)
        self.fails(tmp_path, f"{file}: tensor a: dtype complex128 cannot be merged or stored")
        torch.save({"../a": torch.zeros(3)}, file)
        self.fails(tmp_path, f"{file}: tensor name '../a' is not acceptable")

    def test_a_config_that_is_no_object(self, tmp_path: Path) -> None:
        lay_out(tmp_path, "single")
        (tmp_path / "config.json").write_text("[]")
        self.fails(tmp_path, f"{tmp_path / 'config.json'}: a JSON list, expected an object")
        (tmp_path / "config.json").write_text("{")
        self.fails(tmp_path, f"{tmp_path / 'config.json'}: not valid JSON: ")


def test_json_of_any_kind(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for content in (b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b"", b"null", b'"x"'):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"^{file}: ") as e:
            read_json(file)
        assert "\n" not in str(e.value)
    with pytest.raises(CheckpointError, match=r"none.json: cannot be read: No such file"):
        read_json(tmp_path / "none.json")
