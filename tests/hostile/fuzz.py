"""A fuzzer of everything that seme reads before it merges: ``python -m tests.hostile.fuzz --inputs 100000``.

Inputs are made from the files in ``corpus/``, by changes of bytes and of whole values: wrong types, huge and negative
numbers, deep nesting, keys twice, NaN, bytes that are no UTF-8, paths that lead elsewhere; and files are replaced by
pipes, devices, links and folders. Input number i of a target and a seed is always the same one.

What must hold of each: it is accepted, or refused by a SemeError of one short printable line, within a deadline, in
bounded memory; no file is written, no other process started, no connection made, no code of a model's folder run, no
file elsewhere opened, and what is accepted of a safetensors file lies inside it.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from seme import plan as planning
from seme import steps, vocabulary
from seme.checkpoint import Checkpoint, ModelRef, chat, locate, tokenizer
from seme.checkpoint.adapter import apply
from seme.checkpoint.safetensors import read_header
from seme.config import TokenizerConfig, load
from seme.errors import CheckpointError, SemeError
from seme.merging import with_dtype
from seme.roles import latent, layers, roles
from seme.sections import TEXT, with_layers

CORPUS = Path(__file__).parent / "corpus"
DEADLINE = 10.0
"""Seconds that an input may take."""
LATE = "not done after"
GROWTH = 96 << 20
"""Bytes by which an input may raise the peak of the process's memory."""
ADDRESSES = 3 << 30
"""Bytes of address space beyond what the process has when it begins; more is a MemoryError, and that a fault."""
MESSAGE = 4000
"""Characters that a message has at most."""
BLOCK = 256
"""Inputs that one state of the random numbers makes."""


class Broken(Exception):
    """A property that does not hold."""


class Late(BaseException):
    """The deadline is over; no ``except Exception`` stops it."""


# --- what the process does while an input is read -------------------------------------------------------------------


class Guard:
    """Hears of every file, process and connection that Python opens while ``on``; what is not allowed is noted."""

    CHANGES = frozenset(
        [f"os.{name}" for name in ("remove", "rename", "mkdir", "rmdir", "link", "symlink", "truncate", "chmod")]
        + ["os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen"]
        + ["socket.connect", "socket.getaddrinfo", "socket.bind", "pickle.find_class", "ctypes.dlopen"]
        + ["shutil.copyfile", "shutil.rmtree", "shutil.move", "os.chown", "os.utime", "os.setxattr"]
    )

    def __init__(self, place: Path) -> None:
        self.place = str(place)
        self.on = self.elsewhere = False
        self.seen: list[str] = []
        self.trusted = tuple({sys.prefix, sys.base_prefix, str(Path(planning.__file__).parents[1])})
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(path, int):  # what was opened already
                return
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                self.seen.append(f"opened {path!r} for writing")
            elif not self.elsewhere and isinstance(path, (str, bytes)):
                name = os.path.abspath(os.fsdecode(path))
                if not name.startswith((self.place, *self.trusted)):
                    self.seen.append(f"opened {name!r}, which lies elsewhere")
        elif event == "subprocess.Popen" and list(args[1])[:3] == [sys.executable, "-I", "-c"]:
            pass  # the search of a regular expression
        elif event == "ctypes.dlopen" and str(args[0]).startswith(self.trusted):
            pass  # a library of Python's, imported at first use
        elif event in self.CHANGES:
            self.seen.append(f"{event} {str(args)[:200]}")
        elif event == "exec" and getattr(args[0], "co_filename", "").startswith(self.place):
            self.seen.append("ran code of a model's folder")


def late(signum: int, frame: FrameType | None) -> None:
    raise Late


# --- inputs ---------------------------------------------------------------------------------------------------------

VALUES = [
    *(b"null true false 0 1 2 3 -1 -2 8 17 24 1.5 -0.0 1e999 -1e999 NaN Infinity -Infinity 1e-400 255 65536".split()),
    *(str(n).encode() for n in (2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**12)),
    *(b"9" * 50, b"-" + b"9" * 400, b"9" * 4300, b"9" * 5000, b"1" + b"0" * 4000 + b".5"),
    *(
        b"[]",
        b"{}",
        b'""',
        b"[[]]",
        b"[{}]",
        b'{"":null}',
        b"[1,2]",
        b"[0,8]",
        b"[8,0]",
        b'["a","a"]',
        b'{"a":{"a":1}}',
    ),
    *(b'"a"', b'"b"', b'"0"', b'"-1"', b'"1e5"', b'"F32"', b'"U8"', b'"base"', b'"union"', b'"*"', b'"true"'),
    *(b'"../../etc/passwd"', b'"/etc/passwd"', b'"/dev/zero"', b'".."', b'"."', b'"~"', b'"C:\\\\x"', b'"a/../../b"'),
    *(b'"\\u0000"', b'"a\\nb"', b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\xff\xfe"', b'"\xc0\xaf"', b'"\\u202e"', b'"\\"'),
    *(b'"' + b"x" * 300 + b'"', b'"' + b"\\u0001" * 2000 + b'"', b'"' + "\U000e0001".encode() * 1500 + b'"'),
    *(b'"(a+)+$"', b'"(.*.*.*.*)*x"', b'"["', b'"(?P<a>x)"', b'"\\\\"', b'"' + b"7" * 6000 + b'"'),
    *(b"[" * n + b"]" * n for n in (20, 90, 300)),
    *(b'{"a":' * n + b"1" + b"}" * n for n in (20, 90, 300)),
    *(b"[" * 3000, b'{"a":' * 3000, b"[" + b"0," * 500 + b"0]", b"{},", b",", b":", b"}", b"]", b'"'),
]
YAML_VALUES = [
    *(
        b"- ",
        b"-",
        b"? ",
        b"| ",
        b"> ",
        b"&a ",
        b"*a",
        b"<<: *a",
        b"!!int ",
        b"!!float x",
        b"!!timestamp 1",
        b"!!set {a}",
    ),
    *(
        b"!!binary x",
        b"!!python/object/apply:os.system [id]",
        b"!x y",
        b"%YAML 9.9",
        b"--- ",
        b"...",
        b"#",
        b"\t",
        b"~",
    ),
    *(b"1:1:1:1", b"0x" + b"f" * 300, b"0b1", b"1_000", b".inf", b".nan", b"2001-01-01", b"yes", b"=", b"@", b"`"),
    *(
        b"\n",
        b"\n  ",
        b"\n    ",
        b"\n---\n",
        b"&a [*a]",
        b"{model: &m {model: *m}}",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\0",
    ),
    *(
        b"a+b",
        b"a@main",
        b"a+lora",
        b"lora",
        b"base",
        b"[0, 2]",
        b"[0, 99999999999999999999]",
        b"{filter: x, value: 1}",
    ),
    *(b"[0, 0.5, 1]", b"ties", b"slerp", b"passthrough", b"linear", b"seme", b"dare_ties", b"[" * 150 + b"]" * 150),
]
SPECIAL = b"\0special:"
KINDS = ("pipe", "device", "endless", "folder", "loop", "dangling", "sparse", "unreadable")
"""What a file is replaced by: its content is then :data:`SPECIAL` and one of these."""

_JSON = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null|NaN|[{}\[\],:]')
_YAML = re.compile(rb'"[^"\n]*"|\'[^\'\n]*\'|[^\s,\[\]{}:#&*!|>]+(?!\w*:)|\{[^{}\n]*\}|\[[^\[\]\n]*\]')

Span = tuple[int, int]


class Seed:
    """A file of the corpus with the places of its values, keys and pairs."""

    def __init__(self, data: bytes, start: int = 0, end: int | None = None, yaml: bool = False) -> None:
        self.data = data
        self.values: list[Span] = []
        self.keys: list[Span] = []
        self.pairs: list[Span] = []
        end = len(data) if end is None else end
        if yaml:
            self.values = [m.span() for m in _YAML.finditer(data)]
            self.pairs = [m.span() for m in re.finditer(rb"[^\n]*\n", data)]
            self.keys = [m.span(1) for m in re.finditer(rb"([\w.]+):", data)]
        else:
            self.find(start, end)
        self.all = self.values + self.keys + self.pairs
        self.signs = [m.span() for m in re.finditer(rb"[\[\]{}:,\"-]", data[:end]) if m.start() >= start]

    def find(self, start: int, end: int) -> None:
        """Values, keys and pairs of JSON; of what is none as much as there is."""
        stack: list[tuple[int, bytes, Span | None]] = []
        key: Span | None = None
        last: Span | None = None
        for match in _JSON.finditer(self.data, start, end):
            token, span = match.group(), match.span()
            if token in (b"{", b"["):
                stack.append((span[0], token, key))
                key = last = None
                continue
            if token == b":":
                key, last = last, None
                continue
            if token == b",":
                last = None
                continue
            if token in (b"}", b"]"):
                if not stack:
                    return
                begin, _, key = stack.pop()
                span = (begin, span[1])
            last = span
            if stack and stack[-1][1] == b"{" and key is None and token not in (b"}", b"]"):
                self.keys.append(span)
                continue
            self.values.append(span)
            if key is not None:
                self.pairs.append((key[0], span[1]))
                key = None


class Mutator:
    """Makes inputs from seeds."""

    def __init__(self, seeds: Sequence[bytes], kind: str, generates: bool = False) -> None:
        self.kind, self.generates = kind, generates
        self.seeds = [self.parsed(data) for data in seeds]
        self.pool = [v for v in VALUES if len(v) < 2000] + YAML_VALUES if kind == "yaml" else VALUES
        self.texts = [v for v in self.pool if v[:1] == b'"' == v[-1:] and len(v) > 1]
        values: list[bytes] = []
        keys: list[bytes] = []
        pairs: list[bytes] = []
        for s in self.seeds:
            for parts, spans in ((values, s.values), (keys, s.keys), (pairs, s.pairs)):
                parts += [s.data[a:b] for a, b in spans if b - a < 2000]
        self.values, self.keys, self.pairs = values, keys or self.texts, pairs or values

    def parsed(self, data: bytes) -> Seed:
        if self.kind == "safetensors" and len(data) >= 8:
            (length,) = struct.unpack("<Q", data[:8])
            return Seed(data, 8, min(8 + length, len(data)))
        return Seed(data, yaml=self.kind == "yaml")

    def make(self, r: random.Random) -> bytes:
        """An input."""
        if r.random() < 0.004:
            return SPECIAL + r.choice(KINDS).encode()
        if self.generates and r.random() < 0.35:
            return generated(r)
        seed = r.choice(self.seeds)
        data, header = seed.data, 0
        if self.kind == "safetensors" and len(data) >= 8:
            (header,) = struct.unpack("<Q", data[:8])
        chance, size = r.random(), len(data)
        if chance < 0.92 and seed.all:
            data = self.structured(r, seed)
        if chance > 0.86:
            data = self.bytewise(r, data)
        if header and r.random() < 0.9 and len(data) >= 8:  # the length of a header that was changed
            data = struct.pack("<Q", max(0, header + len(data) - size)) + data[8:]
        return data

    def structured(self, r: random.Random, seed: Seed) -> bytes:
        """Some values, keys or pairs replaced, left out, repeated or wrapped."""
        data, below = seed.data, len(seed.data) + 1
        count = 1 if r.random() < 0.6 else r.randint(2, 4)
        for span, change in sorted((self.change(r, seed) for _ in range(count)), key=lambda c: c[0], reverse=True):
            begin, end = span
            if end <= below:
                below = begin
                data = data[:begin] + change + data[end:]
        return data

    def change(self, r: random.Random, seed: Seed) -> tuple[Span, bytes]:
        """A place, and what to put there."""
        what, data = r.random(), seed.data
        if what < 0.55 and seed.values:
            span = r.choice(seed.values)
            old, how = data[span[0] : span[1]], r.random()
            if how < 0.45:
                return span, r.choice(self.pool)
            if how < 0.7:
                return span, r.choice(self.values)
            if how < 0.85:
                return span, str(r.choice((r.randint(-3, 40), r.getrandbits(r.randint(1, 80))))).encode()
            return span, b"[" + old + b"]" if how < 0.92 else b'{"a":' + old + b"}"
        if what < 0.7 and seed.keys:
            return r.choice(seed.keys), r.choice(self.keys if r.random() < 0.6 else self.texts)
        if what < 0.95 and seed.pairs:
            begin, end = r.choice(seed.pairs)
            old, how, comma = data[begin:end], r.random(), b"" if self.kind == "yaml" else b","
            if how < 0.3:  # left out, with the comma behind it or before it
                if comma and data[end : end + 1] == comma:
                    end += 1
                elif comma and data[begin - 1 : begin] == comma:
                    begin -= 1
                return (begin, end), b""
            if how < 0.4:
                return (begin, end), old + comma + old
            return (begin, end), r.choice(self.pairs) if how < 0.6 else old + comma + r.choice(self.pairs)
        return r.choice(seed.signs or seed.all), r.choice(self.pool)

    def bytewise(self, r: random.Random, data: bytes) -> bytes:
        """Some bytes changed, cut, put in or taken from elsewhere."""
        changed = bytearray(data)
        for _ in range(1 if r.random() < 0.5 else r.randint(2, 6)):
            at, what = r.randint(0, len(changed)), r.random()
            if what < 0.4 and at < len(changed):
                changed[at] = r.choice(b'\0\xff\x80"{}[],:\\-019 \n') if r.random() < 0.6 else r.getrandbits(8)
            elif what < 0.5:
                del changed[at:]
            elif what < 0.65:
                del changed[at : at + r.randint(1, 16)]
            elif what < 0.8:
                changed[at:at] = r.randbytes(r.randint(1, 8))
            elif what < 0.9:
                other = r.choice(self.seeds).data
                start = r.randint(0, len(other))
                changed[at:at] = other[start : start + r.randint(1, 64)]
            else:
                changed[at : at + r.randint(0, 8)] = r.choice(self.pool)
        return bytes(changed)


def generated(r: random.Random) -> bytes:
    """A safetensors file that is right, or wrong in one number."""
    at, header, names = 0, [], ("a", "b", "model.layers.0.w", "lm_head.weight", "x" * 40)
    for i in range(r.randint(0, 4)):
        code, size = r.choice((("F32", 4), ("BF16", 2), ("U8", 1), ("F64", 8), ("BOOL", 1), ("I64", 8)))
        shape = [r.randint(0, 5) for _ in range(r.randint(0, 3))]
        for n in shape:
            size *= n
        header.append([f"{r.choice(names)}{i}", code, shape, at, at + size])
        at += size
    count = at
    if header and r.random() < 0.7:
        one, off = r.choice(header), r.choice((-8, -1, 1, 8, 2**63, -(2**63), 2**64))
        where = r.randint(2, 5)
        if where == 2:
            one[2].append(off)
        elif where < 5:
            one[where] += off
        else:
            count = max(0, count + max(-9, min(9, off)))
    r.shuffle(header)
    text = ",".join(
        f'"{name}":{{"dtype":"{code}","shape":{shape},"data_offsets":[{a},{b}]}}' for name, code, shape, a, b in header
    )
    raw = f"{{{text}}}".encode()
    return struct.pack("<Q", len(raw)) + raw + r.randbytes(count)


def place(path: Path, data: bytes) -> None:
    """Make a file with these contents, or the special one that they name; what was there is gone."""
    try:
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode) or data.startswith(SPECIAL):
            shutil.rmtree(path) if stat.S_ISDIR(mode) else path.unlink()
    except FileNotFoundError:
        pass
    if not data.startswith(SPECIAL):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(descriptor, data)
        os.close(descriptor)
        return
    kind = data[len(SPECIAL) :].decode()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 1 << 43)
    elif kind == "unreadable":
        path.touch(0)
    else:
        path.symlink_to({"device": "/dev/null", "endless": "/dev/zero", "loop": path.name}.get(kind, "nothing"))


# --- targets --------------------------------------------------------------------------------------------------------

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WORDS = ["<unk>", "a", "b", "c", "d", "e"]
LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    """A float32 file of zeros and small numbers."""
    at, header = 0, {}
    for name, shape in shapes.items():
        size = 4
        for n in shape:
            size *= n
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + struct.pack(f"<{at // 4}f", *(i % 7 for i in range(at // 4)))


def model_shapes(layers: int = 2, rows: int = 6, width: int = 4) -> dict[str, list[int]]:
    found = {EMBEDDING: [rows, width]}
    for i in range(layers):
        found[f"model.layers.{i}.self_attn.q_proj.weight"] = [width, width]
        found[f"model.layers.{i}.mlp.down_proj.weight"] = [width, 8]
    return {**found, NORM: [width], HEAD: [rows, width]}


def tokenizer_json(words: Sequence[str]) -> bytes:
    model = {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": words[0]}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model}).encode()


CONFIG = (
    b'{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":4,"num_hidden_layers":2,"vocab_size":6,'
    b'"num_attention_heads":2,"tie_word_embeddings":false,"torch_dtype":"float32"}'
)
LORA = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": [2, 4],
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": [4, 2],
}


class Target(ABC):
    """What is fuzzed: a file in a folder of its own, and what seme does with it."""

    kind = "json"
    elsewhere = False
    share = 1.0
    """Of all inputs."""
    ways = 1
    """In which inputs are used in turns."""

    def __init__(self, where: Path) -> None:
        self.where = where
        where.mkdir()
        self.file = where / "file"
        self.count = 0
        self.prepare()

    def prepare(self) -> None:  # noqa: B027 (most need nothing)
        """Make what is around the file."""

    @abstractmethod
    def run(self, data: bytes) -> None:
        """Read the file; SemeError if it is refused, Broken if it should have been."""


class Header(Target):
    """A safetensors file."""

    kind = "safetensors"
    share = 0.503
    ways = 16

    def prepare(self) -> None:
        self.file = self.where / "model.safetensors"

    def run(self, data: bytes) -> None:
        self.count += 1
        if self.count % 16 and not data.startswith(SPECIAL):
            found = read_header(self.file)
        else:
            with Checkpoint(self.where) as checkpoint:
                found = list(checkpoint.tensors.values())
                for t in found[:4]:
                    if t.nbytes < 1 << 16:
                        buffer = bytearray(t.nbytes)
                        checkpoint.read_into(t, 0, memoryview(buffer))
                        if buffer != data[t.offset : t.offset + t.nbytes]:
                            raise Broken("other bytes than those of the tensor were read")
        shapes = {t.name: t.shape for t in found}
        roles({}, shapes)
        layers(shapes)
        if data.startswith(SPECIAL):
            return
        begin = 8 + struct.unpack("<Q", data[:8])[0]
        if sum(t.nbytes for t in found) != len(data) - begin:
            raise Broken("the tensors do not cover the data")
        if not all(begin <= t.offset <= t.offset + t.nbytes <= len(data) for t in found):
            raise Broken("a tensor lies outside of the data")


class Index(Target):
    """The index of shards."""

    share = 0.15

    def prepare(self) -> None:
        self.file = self.where / "model.safetensors.index.json"
        for name, tensors in (("1", ("a", "b")), ("2", ("c",))):
            (self.where / f"{name}.safetensors").write_bytes(safetensors({t: [2] for t in tensors}))
        (self.where / "sub").mkdir()
        (self.where / "sub" / "3.safetensors").write_bytes(safetensors({"a": [2]}))

    def run(self, data: bytes) -> None:
        with Checkpoint(self.where) as checkpoint:
            if any(f.parent != self.where for f in checkpoint.files):
                raise Broken("a file outside of the folder was taken")


class Config(Target):
    """config.json, with all that is done with it until a merge runs."""

    share = 0.045
    ways = 24

    def prepare(self) -> None:
        for name in ("a", "b"):
            (self.where / name).mkdir()
            (self.where / name / "model.safetensors").write_bytes(safetensors(model_shapes()))
            (self.where / name / "config.json").write_bytes(CONFIG)
            (self.where / name / "tokenizer.json").write_bytes(tokenizer_json(WORDS))
        self.file = self.where / "a" / "config.json"
        a, b = self.where / "a", self.where / "b"
        ends = "[{model: %s, layer_range: [0, 1]}]"
        self.recipes = [
            load(f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]\nparameters: {{weight: 1}}\n"),
            load(f"merge_method: passthrough\nslices:\n- sources: {ends % a}\n- sources: {ends % b}\n"),
            load(
                f"merge_method: linear\nmodels: [{{model: {a}}}, {{model: {b}}}]\nparameters: {{weight: 1}}\n"
                "tokenizer_source: union\n"
            ),
        ]
        self.shapes = {n: tuple(s) for n, s in model_shapes().items()}

    def run(self, data: bytes) -> None:
        self.count += 1
        if self.count % 8 == 0:
            plan = planning.make(self.recipes[self.count // 8 % 3])
            plan.close()
            json.dumps(with_dtype(plan.model_config, plan.out_dtype)).encode()
            return
        with Checkpoint(self.file.parent) as checkpoint:
            config = checkpoint.config
        vocabulary.vocabulary_tensors(config, self.shapes)
        json.dumps(with_dtype(config, planning.dtypes.bfloat16)).encode()
        with_layers(config, TEXT, [(config, 0), (config, 1), (config, 1)])
        latent(config, self.shapes)


class Tokens(Target):
    """tokenizer.json, and the vocabularies that are made of it."""

    share = 0.11
    ways = 40
    name = "tokenizer.json"

    def prepare(self) -> None:
        self.fuzzed, self.other = self.where / "fuzzed", self.where / "other"
        for folder in (self.fuzzed, self.other):
            folder.mkdir()
            (folder / "config.json").write_bytes(CONFIG)
            (folder / "tokenizer.json").write_bytes(tokenizer_json(WORDS))
        (self.other / "tokenizer.json").write_bytes(tokenizer_json([*WORDS[:3], "x", "y"]))
        self.file = self.fuzzed / self.name
        self.refs = [ModelRef(str(self.fuzzed)), ModelRef(str(self.other))]

    def run(self, data: bytes) -> None:
        self.count += 1
        folders, how = [self.fuzzed, self.other], self.count % 4
        if how == 3:
            tokenizer.vocabulary(self.fuzzed)
            chat.choose("auto", folders)
            return
        source = (None, self.refs[1], self.refs[0])[how]
        config = TokenizerConfig(source, {}, 1, "tokenizer_source")
        if how == 2 and self.count % 8 == 2:  # a tokenizer of none of the models
            found = vocabulary.align(config, self.refs[1:], folders[1:], [5], 0, self.fuzzed)
        else:
            found = vocabulary.align(config, self.refs, folders, [4 + self.count % 5, 5], how % 2)
        for text in chat.with_template(found.folder, found.files, "{{ x }}").values():
            text.encode()
        if found.rows > 1 << 24:
            raise Broken(f"{found.rows} tokens")


class Settings(Tokens):
    """tokenizer_config.json."""

    share = 0.05
    name = "tokenizer_config.json"


class Adapter(Target):
    """adapter_config.json of a LoRA adapter."""

    share = 0.06
    names = ("adapter_config.json", "adapter_model.safetensors")

    def prepare(self) -> None:
        (self.where / "model").mkdir()
        (self.where / "model" / "model.safetensors").write_bytes(safetensors(model_shapes()))
        self.tensors = planning.stored_tensors(Checkpoint(self.where / "model"))
        self.folder = self.where / "lora"
        self.folder.mkdir()
        (self.folder / "adapter_config.json").write_text('{"peft_type":"LORA","r":2,"lora_alpha":4}')
        (self.folder / "adapter_model.safetensors").write_bytes(safetensors(LORA))
        self.file = self.folder / self.names[self.kind == "safetensors"]

    def run(self, data: bytes) -> None:
        apply(self.folder, self.tensors)[1].close()


class Lora(Adapter):
    """adapter_model.safetensors of a LoRA adapter."""

    kind = "safetensors"
    share = 0.06


class Recipe(Target):
    """The recipe, as far as the plan."""

    kind = "yaml"
    elsewhere = True
    share = 0.022

    def prepare(self) -> None:
        import torch  # noqa: F401  which some recipes make the planner import

        for name in ("a", "b", "base"):
            folder = self.where / name
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(safetensors(model_shapes()))
            (folder / "config.json").write_bytes(CONFIG)
            (folder / "tokenizer.json").write_bytes(tokenizer_json(WORDS))
        lora = self.where / "lora"
        lora.mkdir()
        (lora / "adapter_config.json").write_text('{"peft_type":"LORA","r":2,"lora_alpha":4}')
        (lora / "adapter_model.safetensors").write_bytes(safetensors(LORA))
        self.file = self.where / "recipe.yml"

    def run(self, data: bytes) -> None:
        if data == SPECIAL + b"pipe":
            return  # as of any program that is given a pipe, the wait is the caller's
        os.chdir(self.where)
        found = steps.read(self.file)
        if len(found) > 1:
            steps.check(found, None)
            return
        planning.make(found[0].config, self.where / "out", recipe=self.file).close()


TARGETS: dict[str, type[Target]] = {
    "header": Header,
    "index": Index,
    "config": Config,
    "tokenizer": Tokens,
    "settings": Settings,
    "adapter": Adapter,
    "lora": Lora,
    "recipe": Recipe,
}


def seeds(name: str) -> dict[str, bytes]:
    """The corpus of a target: contents by name. Those whose names begin with ``once`` are not changed: they are large,
    take seconds, or are special files."""
    return {p.name: p.read_bytes() for p in sorted((CORPUS / name).iterdir())}


def no_hub(ref: ModelRef, weights: bool = True) -> Path:
    """As :func:`seme.checkpoint.resolve`, without a network."""
    found = locate(ref)
    if found is None:
        raise CheckpointError(f"{ref}: only the hub could have it")
    return found


# --- runs -----------------------------------------------------------------------------------------------------------


class Fuzzer:
    """Runs inputs and notes what does not hold."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.guard = Guard(place)
        self.targets: dict[str, Target] = {}
        self.faults: dict[str, dict[str, Any]] = {}
        self.took = 0.0
        self.slowest: dict[str, tuple[float, str]] = {}
        """Seconds, and which input it was."""
        self.taken: dict[str, int] = {}
        """Inputs that were accepted."""
        planning.resolve = no_hub
        signal.signal(signal.SIGALRM, late)

    def target(self, name: str) -> Target:
        if name not in self.targets:
            self.targets[name] = TARGETS[name](self.place / name)
        return self.targets[name]

    def check(self, name: str, data: bytes) -> str | None:
        """What is wrong with how an input is taken; None if nothing."""
        wrong = self.once(name, data, DEADLINE)
        if wrong is not None and wrong.startswith(LATE):  # on a busy machine much may take long, but not for ever
            wrong = self.once(name, data, 20 * DEADLINE)
        return wrong

    def once(self, name: str, data: bytes, deadline: float) -> str | None:
        """As :meth:`check`, with one attempt."""
        target, guard = self.target(name), self.guard
        place(target.file, data)
        guard.elsewhere = target.elsewhere
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wrong: str | None = None
        began = time.perf_counter()
        self.accepted = True
        try:
            signal.setitimer(signal.ITIMER_REAL, deadline)
            guard.on = True
            try:
                target.run(data)
            finally:
                guard.on = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except SemeError as e:
            self.accepted = False
            message = str(e)
            if not message or not message.isprintable():
                wrong = f"the message is not one printable line: {message!r}"
            elif len(message) > MESSAGE:
                wrong = f"the message has {len(message)} characters"
        except Late as e:
            wrong = f"{LATE} {deadline:g} s, in {_where(e)}"
        except BaseException as e:
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            wrong = f"{type(e).__name__} in {_where(e)}: {str(e)[:200]}"
        took = time.perf_counter() - began
        self.took = took
        if guard.seen:
            wrong = wrong or guard.seen[0]
            guard.seen.clear()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        if grown > GROWTH and wrong is None:
            wrong = f"the memory grew by {grown >> 20} MiB"
        return wrong

    def run(self, name: str, data: bytes, origin: str) -> bool:
        """Check an input and keep it if it shows a fault that no other has shown; True if all holds."""
        wrong = self.check(name, data)
        if self.took > self.slowest.get(name, (0.0, ""))[0]:
            self.slowest[name] = self.took, origin
        if wrong is None:
            self.taken[name] = self.taken.get(name, 0) + self.accepted
            return True
        key = re.sub(r"[\d]+ (MiB|characters)|: .*", "", f"{name}: {wrong}"[len(name) + 2 :])
        key = f"{name}: {key}"
        known = self.faults.setdefault(key, {"what": wrong, "origin": origin, "count": 0, "data": data})
        known["count"] += 1
        if len(data) < len(known["data"]):
            known.update(what=wrong, origin=origin, data=data)
        return False


def _where(e: BaseException) -> str:
    """The innermost line of seme in a traceback."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if "/seme/" in f.filename]
    frame = (frames or traceback.extract_tb(e.__traceback__))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"


def inputs(name: str, seed: int, first: int, count: int, mutator: Mutator) -> Iterator[tuple[str, bytes]]:
    """Inputs of a target by number, with what to call them."""
    for block in range(first // BLOCK, -(-(first + count) // BLOCK)):
        r = random.Random(f"{name} {seed} {block}")
        for i in range(block * BLOCK, (block + 1) * BLOCK):
            data = mutator.make(r)
            if first <= i < first + count:
                yield f"{name} {seed} {i}", data


def fuzz(
    fuzzer: Fuzzer, names: Sequence[str], total: int, seed: int, report: Callable[[str, int, float], None]
) -> None:
    """So many inputs, each target its share of them, in turns."""
    for name in names:  # what is imported at first use is no memory of an input
        for file, data in seeds(name).items():
            if not file.startswith("once"):
                fuzzer.check(name, data)
    fuzzer.slowest.clear()
    weight = sum(TARGETS[n].share for n in names)
    wanted = {n: round(total * TARGETS[n].share / weight) for n in names}
    changed = {n: [data for file, data in seeds(n).items() if not file.startswith("once")] for n in names}
    mutators = {n: Mutator(changed[n], TARGETS[n].kind, n == "header") for n in names}
    for name in names:  # the corpus itself
        for file, data in seeds(name).items():
            for _ in range(1 if file.startswith("once") else TARGETS[name].ways):
                fuzzer.run(name, data, f"corpus/{name}/{file}")
    turns = max(1, min(200, total // 20000))
    for turn in range(turns):
        for name in names:
            first, last = (wanted[name] * t // turns for t in (turn, turn + 1))
            began = time.perf_counter()
            for origin, data in inputs(name, seed, first, last - first, mutators[name]):
                fuzzer.run(name, data, origin)
            report(name, last - first, time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run inputs, print what was found; exit code 1 if a property did not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile.fuzz", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--out", type=Path, help="JSON with what was run and found, written anew after every turn")
    parser.add_argument("--keep", type=Path, help="folder for the inputs that broke a property")
    args = parser.parse_args(arguments)
    sys.dont_write_bytecode = True
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[variable] = "1"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, resource.RLIM_INFINITY))
    shared = Path("/dev/shm")
    where = Path(tempfile.mkdtemp(prefix="seme-fuzz-", dir=shared if os.access(shared, os.W_OK) else None))
    counts, times = dict.fromkeys(args.targets, 0), dict.fromkeys(args.targets, 0.0)
    out = args.out.resolve() if args.out else None
    keep = args.keep.resolve() if args.keep else None
    try:
        fuzzer = Fuzzer(where)

        def report(name: str, count: int, seconds: float) -> None:
            counts[name] += count
            times[name] += seconds
            if out is not None:
                out.write_text(json.dumps(result(fuzzer, args.seed, counts, times), indent=1) + "\n")

        fuzz(fuzzer, args.targets, args.inputs, args.seed, report)
    finally:
        os.chdir("/")
        shutil.rmtree(where, ignore_errors=True)
    for name, count in counts.items():
        rate, took = count / max(times[name], 1e-9), fuzzer.slowest.get(name, (0.0, ""))[0]
        taken = fuzzer.taken.get(name, 0)
        print(
            f"{name:9} {count:8} inputs, {taken:7} accepted, {times[name]:7.1f} s, {rate:5.0f}/s, slowest {took:.3f} s"
        )
    for number, (key, fault) in enumerate(fuzzer.faults.items()):
        print(f"FAULT {fault['origin']} ({fault['count']} times): {key.partition(':')[0]}: {fault['what']}")
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{key.partition(':')[0]}-{number}").write_bytes(fault["data"])
    print(f"{sum(counts.values())} inputs, {len(fuzzer.faults)} faults, peak {peak() >> 20} MiB")
    return 1 if fuzzer.faults else 0


def peak() -> int:
    """Bytes of memory that the process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def result(fuzzer: Fuzzer, seed: int, counts: dict[str, int], times: dict[str, float]) -> dict[str, Any]:
    """What a run did so far."""
    return {
        "seed": seed,
        "python": sys.version.split()[0],
        "inputs": sum(counts.values()),
        "seconds": round(sum(times.values()), 1),
        "peak_mib": peak() >> 20,
        "targets": {
            n: {
                "inputs": c,
                "seconds": round(times[n], 1),
                "accepted": fuzzer.taken.get(n, 0),
                "slowest_s": round(fuzzer.slowest.get(n, (0.0, ""))[0], 4),
                "slowest": fuzzer.slowest.get(n, (0.0, ""))[1],
            }
            for n, c in counts.items()
        },
        "faults": [
            {k: v for k, v in f.items() if k != "data"} | {"input": base64.b64encode(f["data"][:3000]).decode()}
            for f in fuzzer.faults.values()
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
