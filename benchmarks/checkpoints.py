"""Random-weight checkpoints in the shape of Llama models: one base and its fine-tunes.

``python -m benchmarks.checkpoints 1.5b FOLDER`` writes ``FOLDER/base`` and ``FOLDER/tuned-1`` to ``tuned-3``:
bfloat16, sharded safetensors with an index, ``config.json``; no tokenizer. The base has std 0.02 (norm gains
1 + that), a fine-tune differs from it in 30 % of its entries by normal noise of std 2e-3.

Weights are slices of one pool of random numbers per model, taken at an offset that depends on the tensor's name:
as fast as the disk, and the same bytes for the same seed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common import MIB, ROOT

if TYPE_CHECKING:
    import numpy as np
    import torch

CHANGED = 0.3
BASE_STD = 0.02
TUNED_STD = 2e-3
SHARDS = 3
POOL = 24 * MIB + 1021  # weights
COMPLETE = "complete"  # file beside the models: how many fine-tunes there are


@dataclass(frozen=True)
class Llama:
    """The numbers of a Llama-architecture ``config.json`` that give its tensors their shapes."""

    vocabulary: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of the forward pass."""
        kv = self.hidden // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            found[layer + "input_layernorm.weight"] = (self.hidden,)
            for name, rows in (("q", self.hidden), ("k", kv), ("v", kv), ("o", self.hidden)):
                found[f"{layer}self_attn.{name}_proj.weight"] = (rows, self.hidden)
            found[layer + "post_attention_layernorm.weight"] = (self.hidden,)
            for name in ("gate", "up"):
                found[f"{layer}mlp.{name}_proj.weight"] = (self.intermediate, self.hidden)
            found[layer + "mlp.down_proj.weight"] = (self.hidden, self.intermediate)
        if self.layers:
            found["model.norm.weight"] = (self.hidden,)
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    def config(self) -> dict[str, object]:
        """``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": self.layers == 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    @property
    def parameters(self) -> int:
        """Number of weights; two bytes each."""
        return sum(prod(shape) for shape in self.tensors().values())


SIZES = {
    "tiny": Llama(vocabulary=2000, hidden=256, layers=4, intermediate=768, heads=8, kv_heads=4),
    "0.43b": Llama(vocabulary=32000, hidden=1024, layers=24, intermediate=4096, heads=16, kv_heads=4),
    "1.5b": Llama(vocabulary=32000, hidden=2048, layers=24, intermediate=7680, heads=16, kv_heads=4),
    "7b": Llama(vocabulary=32000, hidden=4096, layers=32, intermediate=11008, heads=32, kv_heads=32),
    "70b": Llama(vocabulary=128256, hidden=8192, layers=80, intermediate=28672, heads=64, kv_heads=8),
    # One tensor of 4 GiB: shows that memory does not grow with the largest tensor.
    "one-tensor": Llama(vocabulary=524288, hidden=4096, layers=0, intermediate=4096, heads=32, kv_heads=32),
}


class Pools:
    """One pool of random weights per model; the pool of a fine-tune is that of the base with noise added."""

    def __init__(self, fine_tunes: int, seed: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(POOL, generator=generator).mul_(BASE_STD).to(torch.bfloat16)
        self.models = [base]
        for _ in range(fine_tunes):
            delta = torch.randn(POOL, generator=generator).mul_(TUNED_STD)
            delta.mul_(torch.rand(POOL, generator=generator) < CHANGED)
            self.models.append(delta.add_(base).to(torch.bfloat16))

    def weights(self, model: int, name: str, n: int) -> Iterator[torch.Tensor]:
        """The n weights of a tensor in pieces, cut from the same place of the pool for every model."""
        pool = self.models[model]
        at = zlib.crc32(name.encode()) % POOL
        while n:
            piece = pool[at : at + n]
            n -= len(piece)
            at = 0
            yield piece + 1 if name.endswith("norm.weight") else piece

    def data(self, model: int) -> Callable[[str, int], Iterator[np.ndarray]]:
        """The same as bytes, for :func:`store`."""
        import torch

        return lambda name, n: (piece.view(torch.uint8).numpy() for piece in self.weights(model, name, n))


def _shards(tensors: dict[str, tuple[int, ...]], count: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in order, divided into at most ``count`` files of about equal size."""
    limit = sum(prod(s) for s in tensors.values()) / count
    files: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        if files[-1] and filled + prod(shape) / 2 > limit and len(files) < count:
            files.append({})
            filled = 0
        files[-1][name] = shape
        filled += prod(shape)
    return files


def store(
    folder: Path,
    config: Mapping[str, object],
    tensors: dict[str, tuple[int, ...]],
    shards: int,
    data: Callable[[str, int], Iterable[bytes | np.ndarray]] | None,
) -> None:
    """Write a bfloat16 model into a new folder.

    Args:
        folder: made here.
        config: ``config.json``.
        tensors: name -> shape.
        shards: number of weight files, at most.
        data: the bytes of a tensor, from its name and its number of weights; None makes sparse files, all zeros, that
            take no room.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    files = _shards(tensors, shards)
    weight_map = {}
    for number, shard in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(shard):
            begin, end = end, end + 2 * prod(shard[name])
            header[name] = {"dtype": "BF16", "shape": shard[name], "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            if data is None:
                out.truncate(8 + len(text) + end)
                continue
            for name in sorted(shard):
                for piece in data(name, prod(shard[name])):
                    out.write(piece)
    if len(files) > 1:
        size = sum(2 * prod(shape) for shape in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write(folder: Path, llama: Llama, model: int, pools: Pools) -> None:
    """Write one model into a new folder; model 0 is the base."""
    store(folder, llama.config(), llama.tensors(), SHARDS, pools.data(model))


def names(fine_tunes: int) -> list[str]:
    """Folder names of a set: the base first."""
    return ["base", *(f"tuned-{i}" for i in range(1, fine_tunes + 1))]


def make(folder: Path, size: str, fine_tunes: int, seed: int = 0) -> list[Path]:
    """Write a base and its fine-tunes below ``folder``; on any error nothing of them is left."""
    pools = Pools(fine_tunes, seed)
    paths = [folder / name for name in names(fine_tunes)]
    made: list[Path] = []
    try:
        for model, path in enumerate(paths):
            if path.exists():
                raise FileExistsError(f"{path} exists; remove it first")
            made.append(path)
            write(path, SIZES[size], model, pools)
    except BaseException:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return paths


@contextlib.contextmanager
def checkpoints(folder: Path, size: str, fine_tunes: int, keep: bool = False) -> Iterator[list[Path]]:
    """A set of checkpoints made by a child process (so that torch does not stay in this one), removed at the end.

    A complete set that ``keep`` left behind in an earlier run is used again.
    """
    target = folder / f"models-{size}"
    paths = [target / name for name in names(fine_tunes)]
    complete = target / COMPLETE
    if not complete.exists() or int(complete.read_text()) < fine_tunes:
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-m", "benchmarks.checkpoints", size, str(target), "--fine-tunes", str(fine_tunes)]
        try:
            subprocess.run(command, cwd=ROOT, check=True)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
    try:
        yield paths
    finally:
        if not keep:
            shutil.rmtree(target, ignore_errors=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description="make random-weight models")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fine-tunes", type=int, default=3, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.folder, arguments.size, arguments.fine_tunes, arguments.seed)
    (arguments.folder / COMPLETE).write_text(str(arguments.fine_tunes))


if __name__ == "__main__":
    main()
