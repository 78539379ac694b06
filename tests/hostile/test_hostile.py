"""Files as a stranger would make them: each is refused with its name, nothing crashes, hangs or reads elsewhere."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

import seme
from seme.checkpoint import Checkpoint, tokenizer
from seme.checkpoint.safetensors import MAX_HEADER, read_header
from seme.config import KEYS, MergeConfig, load
from seme.errors import CheckpointError, SemeError
from seme.semantics.labels import decoded
from seme.semantics.skeleton import Skeleton


def entry(begin: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


EIGHT = bytes(8)
FINE = {"a": entry(0, 8)}

FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes, too short"),
    "seven bytes": (bytes(7), "7 bytes, too short"),
    "length only": (struct.pack("<Q", 0), "header is not valid JSON"),
    "huge header length": (packed(FINE, EIGHT, 2**63), f"header of {2**63} bytes, at most {MAX_HEADER} are accepted"),
    "header longer than any": (packed(FINE, EIGHT, MAX_HEADER + 1), f"header of {MAX_HEADER + 1} bytes, at most"),
    "header longer than the file": (packed(FINE, EIGHT, 10**6), "header says 1000000 bytes, the file has "),
    "header cut off": (packed(FINE, EIGHT)[:20], "truncated, download it again"),
    "not JSON": (packed(b"{'a': 1}"), "header is not valid JSON"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "header is not valid JSON"),
    "byte order mark": (packed(b"\xef\xbb\xbf{}"), "header is not valid JSON"),
    "two objects": (packed(b"{}{}"), "header is not valid JSON"),
    "array": (packed([]), "header is a JSON list, expected an object"),
    "number": (packed(5), "header is a JSON int"),
    "null": (packed(None), "header is a JSON NoneType"),
    "nested arrays": (packed(b"[" * 10**6), "header is not valid JSON"),
    "nested objects": (packed(b'{"a":' * 10**6), "header is not valid JSON"),
    "nested below the limit": (
        packed(b'{"a":{"dtype":"F32","shape":' + b"[" * 300 + b"]" * 300 + b',"data_offsets":[0,8]}}', EIGHT),
        "tensor a: shape [[[[",
    ),
    "integer of many digits": (packed(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**5 + b"]}}"), "not valid JSON"),
    "integer beyond 63 bits": (packed({"a": entry(0, 8, shape=[2**63])}, EIGHT), "is not a list of sizes"),
    "sizes whose product is beyond 64 bits": (packed({"a": entry(0, 8, shape=[2**62] * 64)}, EIGHT), "needs "),
    "many dimensions": (packed({"a": entry(0, 4, shape=[1] * 65)}, bytes(4)), "is not a list of sizes"),
    "negative size": (packed({"a": entry(0, 8, shape=[-2])}, EIGHT), "shape [-2] is not a list of sizes"),
    "two negative sizes": (packed({"a": entry(0, 8, shape=[-1, -2])}, EIGHT), "is not a list of sizes"),
    "boolean size": (packed({"a": entry(0, 4, shape=[True])}, bytes(4)), "shape [True] is not a list of sizes"),
    "float size": (packed({"a": entry(0, 8, shape=[2.0])}, EIGHT), "shape [2.0] is not a list of sizes"),
    "size as text": (packed({"a": entry(0, 8, shape=["2"])}, EIGHT), "is not a list of sizes"),
    "shape as text": (packed({"a": entry(0, 8, shape="2")}, EIGHT), "is not a list of sizes"),
    "shape as object": (packed({"a": entry(0, 8, shape={"2": 2})}, EIGHT), "is not a list of sizes"),
    "NaN as size": (packed(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', EIGHT), "is not a list of"),
    "negative offset": (packed({"a": {**entry(0, 8), "data_offsets": [-8, 0]}}, EIGHT), "data_offsets [-8, 0]"),
    "float offset": (packed({"a": {**entry(0, 8), "data_offsets": [0, 8.0]}}, EIGHT), "are not [begin, end]"),
    "boolean offset": (packed({"a": {**entry(0, 8), "data_offsets": [False, 8]}}, EIGHT), "are not [begin, end]"),
    "one offset": (packed({"a": {**entry(0, 8), "data_offsets": [8]}}, EIGHT), "are not [begin, end]"),
    "three offsets": (packed({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, EIGHT), "are not [begin, end]"),
    "offsets backwards": (packed({"a": {**entry(0, 8), "data_offsets": [8, 0]}}, EIGHT), "are not [begin, end]"),
    "size that does not fit": (packed({"a": entry(0, 8, shape=[3])}, EIGHT), "shape [3] of float32 needs 12 bytes"),
    "unknown dtype": (packed({"a": entry(0, 8, "F33")}, EIGHT), "tensor a: unknown dtype 'F33'"),
    "dtype as number": (packed({"a": entry(0, 8, 32)}, EIGHT), "tensor a: unknown dtype 32"),
    "dtype as list": (packed({"a": entry(0, 8, [["F32"]])}, EIGHT), "tensor a: unknown dtype [['F32']]"),
    "overlap": (packed({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "tensor b: offset 4 overlaps the tensor"),
    "one inside the other": (packed({"a": entry(0, 16), "b": entry(4, 8)}, bytes(16)), "tensor b: offset 4 overlaps"),
    "the same place twice": (packed({"a": entry(0, 8), "b": entry(0, 8)}, EIGHT), "offset 0 overlaps the tensor"),
    "hole": (packed({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), "tensor b: offset 12 leaves a hole"),
    "hole at the start": (packed({"a": entry(4, 12)}, bytes(12)), "tensor a: offset 4 leaves a hole"),
    "offsets beyond the file": (packed({"a": entry(0, 2**40)}, EIGHT), "truncated, download it again"),
    "empty tensor beyond the file": (packed({"a": entry(2**40, 2**40)}, b""), "leaves a hole"),
    "truncated data": (packed(FINE, bytes(7)), "truncated, download it again"),
    "bytes at the end": (packed(FINE, bytes(9)), "bytes after the last tensor"),
    "bytes without tensors": (packed({}, b"x"), "bytes after the last tensor"),
    "name twice": (packed(b'{"a":{},"a":{}}'), "header is not valid JSON: 'a' is listed twice"),
    "key twice": (
        packed(b'{"a":{"dtype":"F32","dtype":"F64","shape":[2],"data_offsets":[0,8]}}', EIGHT),
        "'dtype' is listed twice",
    ),
    "key missing": (packed({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "tensor a: expected exactly dtype, shape"),
    "key too much": (packed({"a": {**entry(0, 8), "file": "/etc/passwd"}}, EIGHT), "tensor a: expected exactly dtype"),
    "entry as list": (packed({"a": [0, 8]}, EIGHT), "tensor a: expected exactly dtype, shape and data_offsets"),
    "metadata as list": (packed({"__metadata__": [], **FINE}, EIGHT), "__metadata__ is not an object"),
    "name above": (packed({"../a": entry(0, 8)}, EIGHT), "tensor name '../a' is not acceptable"),
    "name inside above": (packed({"x/../../a": entry(0, 8)}, EIGHT), "is not acceptable"),
    "absolute name": (packed({"/etc/passwd": entry(0, 8)}, EIGHT), "tensor name '/etc/passwd' is not acceptable"),
    "backslashes": (packed({"..\\a": entry(0, 8)}, EIGHT), "is not acceptable"),
    "NUL in a name": (packed({"a\0b": entry(0, 8)}, EIGHT), r"tensor name 'a\x00b' is not acceptable"),
    "line break in a name": (packed({"a\nb": entry(0, 8)}, EIGHT), r"tensor name 'a\nb' is not acceptable"),
    "escape in a name": (packed({"\x1b[2J": entry(0, 8)}, EIGHT), r"tensor name '\x1b[2J' is not acceptable"),
    "half a surrogate pair": (packed(b'{"\\ud800":{}}'), r"tensor name '\ud800' is not acceptable"),
    "empty name": (packed({"": entry(0, 8)}, EIGHT), "tensor name '' is not acceptable"),
    "a name of a million characters": (packed({"a" * 10**6: entry(0, 7, shape=[2])}, EIGHT), "needs 8 bytes"),
}


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    begin = time.process_time()
    yield
    assert time.process_time() - begin < 20


def refused(path: Path, message: str, open_: Callable[[Path], Any] = Checkpoint) -> None:
    """Opening fails with one printable line that begins with the file and holds the message."""
    with pytest.raises(CheckpointError) as e:
        open_(path)
    assert message in str(e.value)
    assert str(e.value).startswith(str(path if path.is_file() else path.parent))
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 1000


@pytest.mark.parametrize("content", FILES, ids=str)
def test_safetensors(content: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(FILES[content][0])
    refused(file, FILES[content][1])


def test_the_same_file_without_its_fault_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(packed(FINE, EIGHT))
    assert [t.name for t in read_header(file)] == ["a"]


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = save({"a": torch.zeros(3), "b": torch.ones(2, 2)})
    file = tmp_path / "model.safetensors"
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        refused(file, "")


class TestIndexes:
    def index(self, folder: Path, content: Any) -> Path:
        path = folder / "model.safetensors.index.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    @pytest.mark.parametrize(
        "file",
        [
            "../secret.safetensors",
            "/etc/passwd",
            "sub/model.safetensors",
            "./m.safetensors",
            "..",
            ".",
            "",
            "..\\m.safetensors",
            5,
            None,
            ["m"],
        ],
    )
    def test_entries_that_leave_the_folder(self, file: Any, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "sub").mkdir()
        for place in (tmp_path / "secret", folder / "m", folder / "sub" / "model"):
            save_file({"a": torch.zeros(3)}, place.with_suffix(".safetensors"))
        index = self.index(folder, {"weight_map": {"a": file}})
        with pytest.raises(CheckpointError, match="is not a name in the folder") as e:
            Checkpoint(folder)
        assert str(e.value).startswith(f"{index}: tensor 'a': file ")

    @pytest.mark.parametrize("file", ["m.safetensors\0", "x" * 5000, "\ud800", "a\nb", "folder", "loop"])
    def test_names_that_are_no_file(self, file: str, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "loop").symlink_to("loop")
        self.index(tmp_path, {"weight_map": {"a": file}})
        with pytest.raises(CheckpointError, match="missing shard"):
            Checkpoint(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "not valid JSON"),
            ("[]", "a JSON list, expected an object"),
            ("[" * 10**6, "not valid JSON"),
            ({}, "no weight_map in it"),
            ({"weight_map": {}}, "no weight_map in it"),
            ({"weight_map": [["a", "m"]]}, "no weight_map in it"),
            ('{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', "not valid JSON: 'a' is listed twice"),
        ],
    )
    def test_that_are_none(self, content: Any, message: str, tmp_path: Path) -> None:
        index = self.index(tmp_path, content)
        with pytest.raises(CheckpointError, match=rf"^{index}: {message}"):
            Checkpoint(tmp_path)

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(3)}, tmp_path / "1.safetensors")
        self.index(tmp_path, {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
        with pytest.raises(CheckpointError, match=rf"^{tmp_path / '2.safetensors'}: missing shard, listed in "):
            Checkpoint(tmp_path)

    def test_a_tensor_that_is_not_where_the_index_says(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(3)}, tmp_path / "1.safetensors")
        save_file({"b": torch.zeros(3)}, tmp_path / "2.safetensors")
        self.index(tmp_path, {"weight_map": {"a": "2.safetensors", "b": "2.safetensors"}})
        with pytest.raises(CheckpointError, match=rf"^{tmp_path / '2.safetensors'}: tensor a is missing, the index"):
            Checkpoint(tmp_path)

    def test_a_tensor_the_index_does_not_know(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "1.safetensors")
        self.index(tmp_path, {"weight_map": {"a": "1.safetensors"}})
        with pytest.raises(CheckpointError, match=rf"^{tmp_path / '1.safetensors'}: tensor b is not in the index"):
            Checkpoint(tmp_path)

    def test_a_truncated_shard_is_named(self, tmp_path: Path) -> None:
        for name in ("1", "2"):
            save_file({name: torch.zeros(3)}, tmp_path / f"{name}.safetensors")
        self.index(tmp_path, {"weight_map": {"1": "1.safetensors", "2": "2.safetensors"}})
        os.truncate(tmp_path / "2.safetensors", 50)
        with pytest.raises(CheckpointError, match=rf"^{tmp_path / '2.safetensors'}: .*truncated, download it again"):
            Checkpoint(tmp_path)


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


class TestPickles:
    def write(self, path: Path, how: str, value: Any) -> None:
        if how == "zip":
            torch.save(value, path)
        elif how == "old":
            torch.save(value, path, _use_new_zipfile_serialization=False)
        else:
            path.write_bytes(pickle.dumps(value))

    @pytest.mark.parametrize("how", ["zip", "old", "plain"])
    def test_with_code_are_refused_and_the_code_does_not_run(self, how: str, tmp_path: Path) -> None:
        file, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
        self.write(file, how, {"a": Evil(trace)})
        with warnings.catch_warnings(record=True) as said:  # torch has several lines to say to some
            warnings.simplefilter("always")
            refused(file, "refused by the weights-only loader", lambda _: Checkpoint(tmp_path))
        assert not said
        assert not trace.exists()

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04", bytes(100), b"\x80\x02.", b"not a pickle at all"])
    def test_that_are_none(self, content: bytes, tmp_path: Path) -> None:
        file = tmp_path / "pytorch_model.bin"
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as e:
            Checkpoint(tmp_path)
        assert str(e.value).startswith(str(tmp_path))
        assert "\n" not in str(e.value)

    def test_truncated(self, tmp_path: Path) -> None:
        file = tmp_path / "pytorch_model.bin"
        torch.save({"a": torch.zeros(1000)}, file)
        os.truncate(file, file.stat().st_size // 2)
        refused(file, "refused by the weights-only loader")

    def test_one_element_that_is_said_to_be_many(self, tmp_path: Path) -> None:
        """Copied, as it would be to be merged, it takes all memory."""
        file = tmp_path / "pytorch_model.bin"
        torch.save({"a": torch.zeros(1).expand(2**40)}, file)
        refused(file, "tensor a repeats its elements")

    def test_a_storage_smaller_than_its_tensor(self, tmp_path: Path) -> None:
        whole, file = tmp_path / "whole.bin", tmp_path / "pytorch_model.bin"
        torch.save({"a": torch.arange(1000.0)}, whole)
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                new.writestr(name, data[:16] if name.endswith("data/0") else data)
        refused(file, "refused by the weights-only loader")


class TestCodeOfModels:
    def folder(self, path: Path, trace: Path, auto_map: dict[str, Any]) -> Path:
        """A model with a file of code that leaves a trace when it is run."""
        save_file({"a": torch.zeros(2, 3)}, path / "model.safetensors")
        (path / "code_x.py").write_text(f"open({str(trace)!r}, 'w')\nclass X:\n    pass\n")
        (path / "config.json").write_text(json.dumps({"model_type": "x", "vocab_size": 2, "auto_map": auto_map}))
        return path

    def test_every_load_by_transformers_says_no(self) -> None:
        """Without the argument transformers asks the person at the terminal."""
        calls = []
        for file in sorted(Path(seme.__file__).parent.rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config"):
                    said = {k.arg: k.value for k in node.keywords}.get("trust_remote_code")
                    calls.append((f"{file}:{node.lineno}", isinstance(said, ast.Constant) and said.value is False))
        assert len(calls) >= 5
        assert [where for where, refuses in calls if not refuses] == []

    def test_that_of_a_tokenizer_does_not_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trace = tmp_path / "trace"
        folder = self.folder(tmp_path, trace, {"AutoTokenizer": ["code_x.X", "code_x.X"]})
        (folder / "vocab.txt").write_text("[UNK]\na\nb\n")
        settings = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["code_x.X", "code_x.X"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        with contextlib.suppress(CheckpointError):
            tokenizer.read(folder)
        decoded(folder, 2)
        assert not trace.exists()

    def test_that_of_a_model_does_not_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trace = tmp_path / "trace"
        code = {"AutoConfig": "code_x.X", "AutoModelForCausalLM": "code_x.X"}
        folder = self.folder(tmp_path, trace, code)
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        with Checkpoint(folder) as checkpoint, pytest.raises(SemeError):
            Skeleton(checkpoint)
        assert not trace.exists()

    def test_is_copied_and_does_not_run(self, tmp_path: Path) -> None:
        trace, models = tmp_path / "trace", []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            models.append({"model": str(self.folder(tmp_path / name, trace, {"AutoModel": "code_x.X"}))})
        recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
        seme.merge(recipe, tmp_path / "out")
        assert (tmp_path / "out" / "code_x.py").read_bytes() == (tmp_path / "a" / "code_x.py").read_bytes()
        assert not trace.exists()


class TestFilesThatAreNone:
    """Which a reader would wait for, or read for ever."""

    @pytest.fixture
    def recipe(self, tmp_path: Path) -> dict[str, Any]:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            save_file({"a": torch.zeros(3)}, tmp_path / name / "model.safetensors")
        models = [{"model": str(tmp_path / name)} for name in ("a", "b")]
        return {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "merges.txt"])
    @pytest.mark.parametrize("endless", [False, True])
    def test_among_those_that_are_copied(
        self, name: str, endless: bool, recipe: dict[str, Any], tmp_path: Path
    ) -> None:
        file = tmp_path / "a" / name
        if endless:
            file.symlink_to("/dev/zero")
        else:
            os.mkfifo(file)
        with pytest.raises(CheckpointError, match=rf"^{file}: neither a file nor a folder"):
            seme.merge(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_in_the_folder_of_templates(self, recipe: dict[str, Any], tmp_path: Path) -> None:
        templates = tmp_path / "a" / "additional_chat_templates"
        templates.mkdir()
        (templates / "tool_use.jinja").write_text("{{ x }}")
        (templates / "again").symlink_to(".")
        (templates / "endless.jinja").symlink_to("/dev/zero")
        os.mkfifo(templates / "pipe.jinja")
        seme.merge(recipe, tmp_path / "out")
        made = tmp_path / "out" / "additional_chat_templates"
        assert [f.name for f in made.iterdir()] == ["tool_use.jinja"]


names = st.text(max_size=8) | st.sampled_from(["a", "b", "../x", "__metadata__", "dtype", "shape", "data_offsets"])
small = st.integers(-2, 20) | st.integers(-(2**70), 2**70) | st.floats() | st.booleans() | st.none() | names
trees = st.recursive(small, lambda x: st.lists(x, max_size=3) | st.dictionaries(names, x, max_size=3), max_leaves=12)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F64", "BOOL", "X"]) | trees,
        "shape": st.lists(st.integers(0, 3), max_size=3) | trees,
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2) | trees,
    }
)
headers = st.dictionaries(names, entries | trees, max_size=4).map(lambda h: json.dumps(h).encode()) | st.binary(
    max_size=64
)

FUZZ = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(header=headers, data=st.binary(max_size=24), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_header_is_read_or_refused(header: bytes, data: bytes, length: int | None, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(packed(header, data, length))
    try:
        found = read_header(file)
    except CheckpointError as e:
        found, message = None, str(e)
    if found is None:
        assert message.startswith(str(file))
        assert "\n" not in message
        return
    # What is accepted covers the data and nothing else.
    size = file.stat().st_size
    assert sum(t.nbytes for t in found) == size - 8 - len(header)
    assert all(8 + len(header) <= t.offset <= t.offset + t.nbytes <= size for t in found)


@FUZZ
@given(values=st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_tensors_that_touch_are_accepted(values: list[int], tmp_path: Path) -> None:
    ends = [sum(values[: i + 1]) for i in range(len(values))]
    header = {str(i): entry(end - n, end, "U8", [n]) for i, (n, end) in enumerate(zip(values, ends))}
    file = tmp_path / "model.safetensors"
    file.write_bytes(packed(header, bytes(ends[-1])))
    assert sum(t.nbytes for t in read_header(file)) == ends[-1]


keys = st.sampled_from(
    [
        "merge_method",
        "models",
        "model",
        "base_model",
        "parameters",
        "dtype",
        "weight",
        "filter",
        "value",
        "path",
        "lora",
        "sources",
        "layer_range",
        "tokens",
        "source",
        "kind",
    ]
)
recipes = st.recursive(
    small | st.sampled_from(["ties", "linear", "a@b", "a+b", "base", "union", "float32", "1e-5"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(keys | names, x, max_size=4),
    max_leaves=15,
)
nearly = st.fixed_dictionaries(
    {
        "merge_method": st.just("ties") | recipes,
        "models": st.lists(st.fixed_dictionaries({"model": recipes})) | recipes,
    },
    optional=dict.fromkeys(set(KEYS) - {"merge_method", "models"}, recipes),
)


def only_seme_errors(config: Any) -> None:
    try:
        found: object = load(config)
    except SemeError as e:
        found = e
    if isinstance(found, SemeError):
        assert "\n" not in str(found)
        assert len(str(found)) < 1000
    else:
        assert isinstance(found, MergeConfig)


@FUZZ
@given(recipe=nearly | recipes)
def test_any_recipe_is_read_or_refused(recipe: Any) -> None:
    only_seme_errors(json.dumps(recipe) + "\n")  # JSON is YAML
    if isinstance(recipe, dict):
        only_seme_errors(recipe)


signs = st.sampled_from(list("[]{}:-?!&*#|>'\"%@`,\n\t 0x~.=<"))
tokens = st.sampled_from(["models:", "- ", "&a ", "*a", "<<: ", "!!int ", "!!timestamp ", "!!set "])
YAML = st.lists(signs | tokens, max_size=40).map("".join)


@FUZZ
@given(text=YAML | st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    only_seme_errors(text + "\n")
