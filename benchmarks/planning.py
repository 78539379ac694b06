"""What comes before the merging, and what it leads to where vocabularies differ: seme beside mergekit.

``python -m benchmarks.planning`` measures

- **plan**: planning the merge of four models of 5 000, 10 000 and 20 000 small tensors, with a weight each
  (``models``), with gradients and filters (``gradients``), and with a slice for every tenth of the layers (``slices``);
- **align**: the union of four vocabularies of 152 000 tokens, each in an order of its own and 1 % of them its own;
- **gather**: the whole merge of embedding and head of such models, beside the same merge of the same tensors row by
  row and beside the floor (``floor.py``), all inputs in the page cache.

Every sample is a process of its own. CPU seconds say how much there is to do and hardly depend on what else the machine
does; times on the clock do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import Llama, Pools, write
from benchmarks.common import RESULTS, ROOT, Results, provenance, summarize, table
from benchmarks.merge import mergekit, remove, run_process, shards, warm

ABOUT = {
    "cpu_s": "CPU seconds of the work; of gather: of the whole process, user and system",
    "import_s": "CPU seconds of starting Python and importing the engine, not in cpu_s",
    "wall_s": "seconds on the clock",
    "tensors": "of each of the four models",
    "tokens": "of each of the four vocabularies",
    "bytes": "of one model's tensors with a row per token",
}

MODELS = 4
TENSORS = (5000, 10000, 20000)
TENSORS_PER_LAYER = 9
TOKENS = 152_000
OWN = 0.01
HIDDEN = 896

RECIPES = ("models", "gradients", "slices")
"""Of plan."""


def recipe(kind: str, models: Sequence[Path], layers: int) -> dict[str, Any]:
    """A recipe of a linear merge of the models, in the schema both engines read."""
    weight: Any = 1 / MODELS
    if kind == "gradients":
        weight = [{"filter": "self_attn", "value": [0.1, 0.5, 0.3]}, {"filter": "mlp", "value": [0.2, 0.4]}]
        weight.append({"value": 0.3})
    given = {"parameters": {"weight": weight}}
    config: dict[str, Any] = {"merge_method": "linear", "dtype": "bfloat16"}
    if kind == "slices":
        ends = [layers * i // 10 for i in range(11)]
        spans = [list(span) for span in itertools.pairwise(ends)]
        return config | {
            "slices": [{"sources": [{"model": str(m), "layer_range": s, **given} for m in models]} for s in spans]
        }
    if kind == "union":
        config["tokenizer_source"] = "union"
    return config | {"models": [{"model": str(m), **given} for m in models]}


def vocabularies(tokens: int, own: float, seed: int = 0) -> list[dict[str, Any]]:
    """``tokenizer.json`` of every model: byte-level BPE with merges that make all tokens.

    The ids of the first are in the order of the merges, those of the others in random order.
    """
    draw = random.Random(seed)
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    known, merges = dict.fromkeys(alphabet), []

    def grow(count: int, parts: Sequence[str]) -> tuple[list[str], list[list[str]]]:
        made: list[str] = []
        pairs: list[list[str]] = []
        while len(made) < count:
            pair = [draw.choice(parts), draw.choice(parts)]
            token = "".join(pair)
            if len(token) <= 12 and token not in known:
                known[token] = None
                made.append(token)
                pairs.append(pair)
        return made, pairs

    common = list(alphabet)
    while (left := tokens - int(tokens * own) - len(common)) > 0:
        made, pairs = grow(min(left, 4 * len(common)), common)
        common += made
        merges += pairs
    found = []
    for model in range(MODELS):
        made, pairs = grow(tokens - len(common), common)
        listed = [*common, *made]
        if model:
            draw.shuffle(listed)
        bpe = {"type": "BPE", "vocab": {t: i for i, t in enumerate(listed)}, "merges": [*merges, *pairs]}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        found.append(
            {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
             "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": bpe}
        )  # fmt: skip
    return found


def make(folder: Path, llama: Llama, tokenizers: Sequence[Mapping[str, Any]] = ()) -> list[Path]:
    """Random-weight models."""
    pools = Pools(MODELS - 1, seed=0)
    paths = [folder / f"model-{i}" for i in range(MODELS)]
    for i, path in enumerate(paths):
        write(path, llama, i, pools)
        if tokenizers:
            (path / "tokenizer.json").write_text(json.dumps(tokenizers[i], ensure_ascii=False))
            (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return paths


def planner(engine: str, what: str, config: Path) -> dict[str, float]:
    """One sample by ``planner.py``."""
    command = [sys.executable, "-m", "benchmarks.planner", engine, what, str(config), str(config.parent / "out")]
    run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def summary(samples: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Statistics of every engine's samples."""
    return {engine: {key: summarize([run[key] for run in runs]) for key in runs[0]} for engine, runs in samples.items()}


def measure_planner(what: str, config: Path, rounds: int, peer: bool) -> dict[str, Any]:
    """Both engines in turns; mergekit once."""
    samples: dict[str, list[dict[str, float]]] = {"seme": []}
    for number in range(rounds):
        samples["seme"].append(planner("seme", what, config))
        if peer and number == 0:
            samples["mergekit"] = [planner("mergekit", what, config)]
    return {"seconds": summary(samples), "samples": samples}


def measure_gather(configs: Mapping[str, Path], models: Sequence[Path], rounds: int, peer: bool) -> dict[str, Any]:
    """Whole merges: of the union of the vocabularies, and row by row, in turns with the floor; mergekit once."""
    scratch = next(iter(configs.values())).parent
    out, log = scratch / "out", scratch / "log"
    size = sum(file.stat().st_size for file in shards(models[0]))
    inputs = [[str(f) for f in shards(m)] for m in models]
    spec = {"inputs": inputs, "output": str(out), "bytes": size, "threads": 2, "chunk": 1 << 20, "shared": True,
            "limit": None, "fsync": True}  # fmt: skip
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in ("floor", *configs)}
    for number in range(rounds):
        warm([file for model in models for file in shards(model)])
        command = [sys.executable, str(ROOT / "benchmarks" / "floor.py"), json.dumps(spec)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        samples["floor"].append({"wall_s": found["fsync_s"], "cpu_s": found["user_s"] + found["system_s"]})
        remove(out)
        commands = {
            name: [sys.executable, "-m", "seme", "merge", str(c), str(out), "--threads", "2", "--quiet"]
            for name, c in configs.items()
        }
        if peer and number == 0:
            commands["mergekit"] = [str(mergekit()), str(configs["union"]), str(out), "--num-threads", "2", "--quiet"]
        for name, each in commands.items():
            run = run_process(each, 2, log)
            sample = {"wall_s": run["wall_s"], "cpu_s": run["user_s"] + run["system_s"]}
            samples.setdefault(name, []).append({**sample, "peak_anonymous_bytes": run["peak_anonymous_bytes"]})
            remove(out)
    return {"bytes": size, "seconds": summary(samples), "samples": samples}


def report(entries: Mapping[str, Mapping[str, Any]], what: str) -> str:
    """A Markdown table of what is planned or aligned: median CPU seconds."""
    rows = []
    for name, entry in entries.items():
        if name.startswith(f"{what}/"):
            row = [name.removeprefix(f"{what}/").replace("/", " ")]
            for key in ("cpu_s", "import_s"):
                row += [_median(entry, engine, key) for engine in ("seme", "mergekit")]
            if "mergekit" in entry["seconds"]:
                ours, theirs = (entry["seconds"][e]["cpu_s"]["median"] for e in ("seme", "mergekit"))
                row.append(f"{theirs / ours:.1f}x")
            else:
                row.append("-")
            rows.append(row)
    return table(["what", "seme s", "mergekit s", "imports: seme", "mergekit", "seme is faster"], rows)


def report_gather(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of the merges of embeddings and heads."""
    names = {"floor": "I/O alone", "models": "row by row", "union": "union", "mergekit": "union, mergekit"}
    rows = []
    for name, entry in entries.items():
        if name.startswith("gather/"):
            for key, label in names.items():
                if key in entry["seconds"]:
                    rows.append([label, *(_median(entry, key, of) for of in ("wall_s", "cpu_s"))])
    return table(["merge", "s", "CPU s"], rows)


def _median(entry: Mapping[str, Any], engine: str, key: str) -> str:
    found = entry["seconds"].get(engine)
    return f"{found[key]['median']:.2f}" if found else "-"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description="time what precedes a merge")
    parser.add_argument("--what", nargs="+", default=["plan", "align", "gather"], choices=["plan", "align", "gather"])
    parser.add_argument("--tensors", nargs="+", type=int, default=list(TENSORS))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="width of the embeddings of gather")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="without mergekit")
    parser.add_argument("--dir", type=Path, help="scratch folder that is kept, models and all, and used again")
    parser.add_argument("--out", type=Path, default=RESULTS / "planning-cpu.json")
    options = parser.parse_args(arguments)
    results = Results(options.out, provenance(), ABOUT)
    peer = not options.no_peer and mergekit() is not None
    scratch = options.dir or Path(tempfile.mkdtemp())

    def config(folder: Path, kind: str, models: Sequence[Path], layers: int) -> Path:
        (folder / f"{kind}.yml").write_text(json.dumps(recipe(kind, models, layers), indent=1))
        return folder / f"{kind}.yml"

    def models(folder: Path, llama: Llama, tokenizers: Sequence[Mapping[str, Any]] = ()) -> list[Path]:
        if (folder / "complete").exists():
            return [folder / f"model-{i}" for i in range(MODELS)]
        shutil.rmtree(folder, ignore_errors=True)
        made = make(folder, llama, tokenizers)
        (folder / "complete").touch()
        return made

    try:
        for count in options.tensors if "plan" in options.what else ():
            folder, layers = scratch / f"plan-{count}", count // TENSORS_PER_LAYER
            paths = models(folder, Llama(64, 8, layers, 16, 2, 1))
            for kind in RECIPES:
                entry = measure_planner("plan", config(folder, kind, paths, layers), options.rounds, peer)
                results.put(f"plan/{count} tensors/{kind}", {"tensors": count, **entry})
                print(f"plan {count} {kind}: {entry['seconds']['seme']['cpu_s']['median']:.2f} CPU s", flush=True)
        if {"align", "gather"} & set(options.what):
            folder = scratch / f"vocabulary-{options.tokens}-{options.hidden}"
            made = [] if (folder / "complete").exists() else vocabularies(options.tokens, OWN)
            paths = models(folder, Llama(options.tokens, options.hidden, 1, options.hidden, 14, 2), made)
            union = config(folder, "union", paths, 1)
        if "align" in options.what:
            entry = measure_planner("align", union, options.rounds, peer)
            results.put(f"align/union of {options.tokens} tokens", {"tokens": options.tokens, **entry})
            print(f"align: {entry['seconds']['seme']['cpu_s']['median']:.2f} CPU s", flush=True)
        if "gather" in options.what:
            configs = {"models": config(folder, "models", paths, 1), "union": union}
            entry = measure_gather(configs, paths, options.rounds, peer)
            results.put(f"gather/{options.tokens} x {options.hidden}", {"tokens": options.tokens, **entry})
    finally:
        if options.dir is None:
            shutil.rmtree(scratch, ignore_errors=True)
    for what in ("plan", "align"):
        print(report(results.data["entries"], what))
        print()
    print(report_gather(results.data["entries"]))


if __name__ == "__main__":
    main()
