"""Merges of large models: seconds, memory and open files, of many bytes and of many tensors.

``python -m benchmarks.scale`` measures

- **70b**: models in the shape of Llama 3 70B, 141 GB each in 30 shards. Their files are sparse, and the output's data
  is dropped, so they take no room; all of it is planned, read and computed. ``zeros``: read from the sparse files.
  ``noise``: random numbers, read in their stead from a file of 50 MB for each model, at another place for each tensor.
- **moe**: mixtures of experts of 10 000 small tensors in 100 shards and of 100 000 in 1 000, read from disk and written
  to it, by a process that may have 1 024 files open. Ten times as much must take ten times as long.

Every merge is a process of its own (``merger.py``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SIZES, Llama, Pools, store
from benchmarks.common import MIB, RESULTS, ROOT, Results, provenance, summarize, table
from benchmarks.merge import METHODS, remove, shards, warm
from benchmarks.merger import SPARE

ABOUT = {
    "plan": "from the text of the recipe to a plan that is ready to run",
    "merge": "running it; of moe with fsync, of 70b the output's data is dropped",
    "wall_s, cpu_s": "seconds on the clock, and of the CPU in all threads; start of Python not in them",
    "bytes": "of one model's tensors",
    "bytes_read, bytes_written": "by all passes of the method; of 70b written means given to the writer",
    "gb_per_s": "10^9 bytes_read in a second of merge.wall_s",
    "plan_anonymous_bytes, peak_anonymous_bytes": "largest RssAnon of the process up to the end of planning, and of "
    "all of it, sampled every 20 ms: memory that is not page cache",
    "peak_rss_bytes": "VmHWM",
    "descriptors": "most files open at once, those of Python included, sampled every 20 ms",
}

FILES = 1024
"""``ulimit -n`` of the processes."""
TENSORS, PER_SHARD = (10_000, 100_000), 100
EXPERTS, HIDDEN, INTERMEDIATE = 128, 32, 48
LLAMA = SIZES["70b"]
SHARDS = 30


def moe(count: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a Qwen3 mixture of experts with ``count`` tensors, of which the last layer may be cut off."""

    def names() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (256, HIDDEN)
        yield "model.norm.weight", (HIDDEN,)
        yield "lm_head.weight", (256, HIDDEN)
        for i in itertools.count():
            layer = f"model.layers.{i}."
            for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
                yield f"{layer}{norm}.weight", (HIDDEN if "layernorm" in norm else 8,)
            for name in "qkvo":
                yield f"{layer}self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)
            yield layer + "mlp.gate.weight", (EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                for name in ("gate", "up", "down"):
                    shape = (HIDDEN, INTERMEDIATE) if name == "down" else (INTERMEDIATE, HIDDEN)
                    yield f"{layer}mlp.experts.{expert}.{name}_proj.weight", shape

    return dict(itertools.islice(names(), count))


def moe_config(count: int) -> dict[str, object]:
    """``config.json`` to that."""
    layers = sum(name.endswith("input_layernorm.weight") for name in moe(count))
    llama = Llama(256, HIDDEN, layers, INTERMEDIATE, 4, 4).config()
    own = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    return {**llama, **own, "num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE}


def recipe(method: str, models: Sequence[Path]) -> str:
    """Of the models, of which the first is the base if the method has one; the others are merged with equal weights."""
    base = METHODS[method].base
    tuned = models[1:] if base else models
    parameters: dict[str, Any] = {"weight": 1 / len(tuned)}
    if method == "ties":
        parameters["density"] = 0.2
    config: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    config["models"] = [{"model": str(m), "parameters": parameters} for m in tuned]
    return json.dumps({**config, **({"base_model": str(models[0])} if base else {})}, indent=1)


def merger(spec: Mapping[str, Any]) -> dict[str, Any]:
    """One run of ``merger.py``."""
    command = [sys.executable, "-m", "benchmarks.merger", json.dumps(spec)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return {**found, "gb_per_s": found["bytes_read"] / found["merge"]["wall_s"] / 1e9}


def noise(folder: Path, models: Sequence[Path]) -> dict[str, str]:
    """A file of random numbers for each model: those of a base and its fine-tunes."""
    found, pools = {}, Pools(len(models) - 1, seed=0)
    for i, model in enumerate(models):
        file = folder / f"{model.name}.noise"
        with open(file, "wb") as out:
            data = b"".join(piece.tobytes() for piece in pools.data(i)("", len(pools.models[i])))
            out.write(data + data[:SPARE])
        found[model.name] = str(file)
    return found


def measure(
    folder: Path, method: str, models: Sequence[Path], rounds: int, cached: bool, **spec: Any
) -> dict[str, Any]:
    """Merges of models into a folder beside them, again and again: one entry."""
    (folder / "recipe.yml").write_text(recipe(method, models))
    given = {"recipe": str(folder / "recipe.yml"), "out": str(folder / "out"), "files": FILES, **spec}
    samples = []
    for _ in range(rounds):
        if cached:
            warm([file for model in models for file in shards(model)])
        samples.append(merger(given))
        remove(folder / "out")
    same = ("tensors", "shards", "bytes_read", "bytes_written")
    about = {key: samples[0][key] for key in same}
    medians = {
        f"{part}_{key}": summarize([s[part][key] for s in samples])["median"]
        for part in ("plan", "merge")
        for key in ("wall_s", "cpu_s")
    }
    peaks = {
        key: max(s[key] for s in samples)
        for key in ("plan_anonymous_bytes", "peak_anonymous_bytes", "peak_rss_bytes", "descriptors")
    }
    speed = summarize([s["gb_per_s"] for s in samples])["median"]
    return {"models": len(models), "method": method, "threads": spec["threads"], **about, **medians, **peaks,
            "gb_per_s": speed, "samples": samples}  # fmt: skip


def report(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table."""
    rows = []
    for name, entry in entries.items():
        rows.append(
            [
                name.replace("/", " "),
                f"{entry['tensors']:,}".replace(",", " "),
                str(entry["input_shards"]),
                f"{entry['bytes'] * entry['models'] / 1e9:.1f}",
                f"{entry['plan_wall_s']:.2f}",
                f"{entry['merge_wall_s']:.1f}",
                f"{entry['merge_cpu_s']:.1f}",
                f"{entry['gb_per_s']:.1f}",
                f"{entry['plan_anonymous_bytes'] / MIB:.0f}",
                f"{entry['peak_anonymous_bytes'] / MIB:.0f}",
                str(entry["descriptors"]),
            ]
        )
    header = ["models", "tensors", "shards", "GB", "plan s", "merge s", "CPU s", "GB/s"]
    return table([*header, "plan MiB", "peak MiB", "files"], rows)


@contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """A folder that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="seme-scale-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    memory = Path("/dev/shm")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="measure merges of large models")
    parser.add_argument("--what", nargs="+", default=["70b", "moe"], choices=["70b", "moe"])
    parser.add_argument("--methods", nargs="+", default=["linear", "ties"], choices=["linear", "ties"])
    parser.add_argument("--data", nargs="+", default=["zeros", "noise"], choices=["zeros", "noise"], help="of 70b")
    parser.add_argument("--layers", type=int, default=LLAMA.layers, help="of 70b")
    parser.add_argument("--tensors", nargs="+", type=int, default=list(TENSORS), help="of moe, 100 in a shard")
    parser.add_argument("--rounds", type=int, default=3, help="of moe; 70b runs once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dir", type=Path, help="where moe is made; default: TMPDIR")
    parser.add_argument(
        "--sparse-dir",
        type=Path,
        default=memory if memory.is_dir() else None,
        help="where 70b is made; in a tmpfs, the default, sparse files take no page cache when they are read",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args(arguments)
    results = Results(options.out, provenance(), ABOUT)

    def put(key: str, entry: Mapping[str, Any]) -> None:
        results.put(key, dict(entry))
        print(report({key: results.data["entries"][key]}), flush=True)

    if "70b" in options.what:
        llama = Llama(**{**vars(LLAMA), "layers": options.layers})
        size = "70b" if options.layers == LLAMA.layers else f"70b, {options.layers} of {LLAMA.layers} layers"
        with scratch(options.sparse_dir) as folder:
            models = [folder / f"model-{i}" for i in range(3)]
            for model in models:
                store(model, llama.config(), llama.tensors(), SHARDS, None)
            about = {"bytes": 2 * llama.parameters, "input_shards": len(shards(models[0]))}
            files = noise(folder, models)
            for method, data in itertools.product(options.methods, options.data):
                used = models if method == "ties" else models[:2]
                read = files if data == "noise" else None
                entry = measure(
                    folder, method, used, 1, False, threads=options.threads, shard=5 * 10**9, discard=True, noise=read
                )
                put(f"{size}/{method}/{data}", {**about, "data": data, **entry})
    if "moe" in options.what:
        with scratch(options.dir) as folder:
            pools = Pools(2, seed=0)
            for count in options.tensors:
                tensors = moe(count)
                wanted, nbytes = count // PER_SHARD, 2 * sum(map(prod, tensors.values()))
                models = [folder / str(count) / f"model-{i}" for i in range(3)]
                for i, model in enumerate(models):
                    store(model, moe_config(count), tensors, wanted, pools.data(i))
                about = {"bytes": nbytes, "input_shards": len(shards(models[0]))}
                for method in options.methods:
                    used = models if method == "ties" else models[:2]
                    entry = measure(
                        models[0].parent, method, used, options.rounds, True, threads=options.threads,
                        shard=nbytes // wanted, discard=False, noise=None,
                    )  # fmt: skip
                    put(f"moe, {count} tensors/{method}", {**about, "data": "noise", **entry})
                shutil.rmtree(models[0].parent)
    print(report(results.data["entries"]))


if __name__ == "__main__":
    main()
