"""seme/checkpoint/safetensors.py: our reading and writing agree with the format's own library."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from seme import dtypes
from seme.checkpoint.safetensors import Stored, check_name, make_header, read_header
from seme.errors import CheckpointError

SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (5, 3), (2, 3, 4)]


def every_dtype_and_shape() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for dtype in dtypes.BY_NAME.values():
        for i, shape in enumerate(SHAPES):
            raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
            numel = raw.numel() // dtype.itemsize
            tensors[f"{dtype}.{i}"] = (
                raw.reshape(-1).view(dtype.to_torch()).reshape(shape)
                if numel
                else torch.empty(shape, dtype=dtype.to_torch())
            )
    return tensors


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_the_librarys_files_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    tensors = every_dtype_and_shape()
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    content = file.read_bytes()
    found = {t.name: t for t in read_header(file)}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        t = found[name]
        assert (t.dtype.to_torch(), t.shape, t.numel, t.file) == (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.numel(),
            file,
        )
        assert content[t.offset : t.offset + t.nbytes] == raw_bytes(tensor), name


def test_tensors_come_in_the_order_of_their_data(tmp_path: Path) -> None:
    header = {
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [3, 5]},
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "empty": {"dtype": "U8", "shape": [0], "data_offsets": [3, 3]},
    }
    raw = json.dumps(header).encode()
    file = tmp_path / "m.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + b"12345")
    begin = 8 + len(raw)
    assert read_header(file) == [
        Stored("a", dtypes.BY_CODE["U8"], (3,), file, begin, 3),
        Stored("empty", dtypes.BY_CODE["U8"], (0,), file, begin + 3, 0),
        Stored("b", dtypes.BY_CODE["U8"], (2,), file, begin + 3, 2),
    ]


def test_our_files_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = every_dtype_and_shape()
    listed = [(name, dtypes.from_torch(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    header, offsets, size = make_header(listed)
    content = bytearray(size)
    content[: len(header)] = header
    for name, tensor in tensors.items():
        content[offsets[name] : offsets[name] + len(raw_bytes(tensor))] = raw_bytes(tensor)
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    with safetensors.safe_open(file, "pt") as f:
        assert f.metadata() == {"format": "pt"}
        assert set(f.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            found = f.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert raw_bytes(found) == raw_bytes(tensor), name
    assert {t.name: t.offset for t in read_header(file)} == offsets


@pytest.mark.parametrize("name", ["a", "ab", "abcdefg", "ä.weight", "x" * 1000, "model.layers.0.weight", "層"])
def test_data_begins_at_a_multiple_of_eight(name: str, tmp_path: Path) -> None:
    header, offsets, size = make_header([(name, dtypes.float32, (3,))])
    assert len(header) % 8 == 0
    assert (offsets[name], size) == (len(header), len(header) + 12)
    file = tmp_path / "m.safetensors"
    file.write_bytes(header + bytes(12))
    assert list(safetensors.torch.load_file(file)) == [name] == [t.name for t in read_header(file)]


def test_a_file_without_tensors(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    safetensors.torch.save_file({}, file)
    assert read_header(file) == []
    header, offsets, size = make_header([])
    assert (offsets, size) == ({}, len(header))


@pytest.mark.parametrize("name", ["a", "a b", "model.layers.0.w", "wörter.層", "a..b", "a/b", ".a", "..."])
def test_names_that_are_accepted(name: str) -> None:
    check_name(Path("f"), name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../a",
        "a/../b",
        "a\\..\\b",
        "/a",
        "\\a",
        "a\0b",
        "a\nb",
        "\x1b[2J",
        "\x9bm",
        "\ud800",
        "\u202ea",
        "__metadata__",
    ],
)
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"^f: tensor name .* is not acceptable") as e:
        check_name(Path("f"), name)
    assert str(e.value).isprintable()
