"""Text of five kinds that an installation of seme's dependencies holds, split by file, as tokens.

The base is trained on English (documentation written into Python packages, package descriptions, licences); each expert
on one of the other four. Python code comes from other packages than the documentation, without its docstrings, so no
sentence is in two domains.
"""

from __future__ import annotations

import random
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from seme.errors import SemeError

BASE = "english"
DOMAINS = ("python", "c++", "cmake", "stubs")
END = "<|endoftext|>"

Sources = dict[str, tuple[tuple[str, str], ...]]

# (package, pattern) of each domain; "" is the standard library. A package that is not installed is passed over.
FILES: Sources = {
    "english": (
        ("torch", "../*.dist-info/METADATA"),
        ("torch", "../*.dist-info/licenses/LICENSE*"),
        ("transformers", "**/*.py"),
        ("sympy", "**/*.py"),
        ("networkx", "**/*.py"),
    ),
    "python": (("", "**/*.py"), ("torch", "**/*.py")),
    "c++": (("torch", "include/ATen/*.h"), ("torch", "include/ATen/*/*.h"), ("torch", "include/c10/**/*.h"),
            ("torch", "include/torch/**/*.h")),
    "cmake": (("cmake", "data/share/**/*.cmake"), ("torch", "share/cmake/**/*.cmake")),
    "stubs": (("torch", "**/*.pyi"), ("numpy", "**/*.pyi")),
}  # fmt: skip
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "ops"}

DOCSTRING = re.compile(r'[rR]?"""(.*?)"""', re.DOTALL)


@dataclass(frozen=True)
class Amounts:
    """How much text: characters of each domain to train on, and of one file; tokens; windows to measure on.

    Attributes:
        base_chars: characters of English.
        chars: characters of each other domain.
        file_chars: the most taken from one file, so that none dominates.
        files: the most files of a domain that are looked at.
        vocabulary: tokens of the byte-level BPE tokenizer.
        context: tokens of a window.
        windows: windows of each domain to measure on.
    """

    base_chars: int = 4_000_000
    chars: int = 2_000_000
    file_chars: int = 40_000
    files: int = 1500
    vocabulary: int = 2048
    context: int = 128
    windows: int = 64


@dataclass(frozen=True)
class Corpus:
    """Token ids: a sequence of each domain to train on (int32) and windows [n, context] to measure on (int64)."""

    train: dict[str, torch.Tensor]
    valid: dict[str, torch.Tensor]


def load(folder: Path, seed: int, amounts: Amounts) -> Corpus:
    """The corpus of a seed, made and kept in ``folder`` the first time.

    Raises:
        SemeError: too little text of a domain is installed.
    """
    from safetensors.torch import load_file, save_file

    file = folder / "corpus.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "corpus.part"
        save_file(_make(seed, amounts), part)
        part.replace(file)
    tensors = load_file(file)
    names = (BASE, *DOMAINS)
    return Corpus({d: tensors[f"train/{d}"] for d in names}, {d: tensors[f"valid/{d}"].long() for d in names})


def _make(seed: int, amounts: Amounts) -> dict[str, torch.Tensor]:
    texts = {d: _split(d, seed, amounts) for d in (BASE, *DOMAINS)}
    # The tokenizer sees as much of each domain, and none of the text that is measured on.
    share = min(amounts.chars, 500_000)
    tokenizer = _tokenizer([t for train, _ in texts.values() for t in _take(iter(train), share)], amounts.vocabulary)
    tensors = {}
    for domain, (train, valid) in texts.items():
        tensors[f"train/{domain}"] = _tokens(tokenizer, train)
        ids = _tokens(tokenizer, valid)
        if len(ids) < amounts.windows * amounts.context:
            raise SemeError(f"quality: {len(ids)} tokens of {domain} to measure on; expected "
                            f"{amounts.windows * amounts.context}; install the packages of seme[test]")  # fmt: skip
        starts = torch.linspace(0, len(ids) - amounts.context, amounts.windows).long()
        tensors[f"valid/{domain}"] = ids[starts[:, None] + torch.arange(amounts.context)]
    return tensors


def _split(domain: str, seed: int, amounts: Amounts) -> tuple[list[str], list[str]]:
    """Texts to train on and texts to measure on, from different files; paragraphs in both are only measured on."""
    shuffle = random.Random(f"{domain} {seed}")
    files = _files(domain)
    shuffle.shuffle(files)
    texts = (t for f in files[: amounts.files] if len(t := _read(domain, f)) > 400)
    # Bytes of text for one token: about 2.5 to 4. A short part of many files says more than a few whole files.
    wanted = 5 * amounts.windows * amounts.context
    valid = []
    for text in texts:
        start = shuffle.randrange(max(1, len(text) - 6000))
        valid.append(text[start : start + 6000])
        wanted -= len(valid[-1])
        if wanted <= 0:
            break
    held_out = {p for text in valid for p in text.split("\n\n") if len(p) > 80}
    kept = ("\n\n".join(p for p in text.split("\n\n") if p not in held_out) for text in texts)
    chars = amounts.base_chars if domain == BASE else amounts.chars
    train = _take((text[: amounts.file_chars] for text in kept), chars)
    if sum(map(len, train)) < chars // 4:
        found = sum(map(len, train))
        raise SemeError(f"quality: {found} characters of {domain} in {len(files)} files; expected {chars // 4}; "
                        "install the packages of seme[test]")  # fmt: skip
    return train, valid


def _files(domain: str) -> list[Path]:
    found: set[Path] = set()
    for package, pattern in FILES[domain]:
        if package:
            spec = find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                continue
            root = Path(spec.submodule_search_locations[0])
        else:
            root = Path(sysconfig.get_path("stdlib"))
        inside = (f for f in root.glob(pattern) if not SKIPPED & set(f.relative_to(root).parts[:-1]))
        found.update(f for f in inside if f.is_file())
    return sorted(found)


def _read(domain: str, file: Path) -> str:
    text = file.read_text(encoding="utf-8", errors="replace")
    if domain == "english" and file.suffix == ".py":
        return "\n\n".join(textwrap.dedent(d).strip() for d in DOCSTRING.findall(text) if len(d) > 200)
    return DOCSTRING.sub('""""""', text) if domain == "python" else text


def _take(texts: Iterator[str], length: int) -> list[str]:
    taken: list[str] = []
    while length > 0 and (text := next(texts, None)) is not None:
        taken.append(text)
        length -= len(text)
    return taken


def _tokenizer(documents: Iterable[str], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet,
                                       show_progress=False)
    )  # fmt: skip
    return bpe


def _tokens(tokenizer: Any, documents: list[str]) -> torch.Tensor:
    """One sequence of ids, an end-of-text token (0) before each document."""
    encoded = tokenizer.encode_batch(documents)
    return torch.tensor([i for e in encoded for i in (0, *e.ids)], dtype=torch.int32)
