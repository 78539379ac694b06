"""Command line: ``python -m benchmarks.quality [run|train|report]``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import RESULTS, provenance
from benchmarks.quality import corpus, report
from benchmarks.quality.grid import METHODS, Shared, Unit
from benchmarks.quality.models import SMOKE, Settings, Trained

DIR = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seme" / "quality"
OUT = RESULTS / "quality.json"
ABOUT = {
    "loss": "nats per token on held-out text, by domain",
    "SIZE/SEED/base": "the base",
    "SIZE/SEED/DRIFT/expert DOMAIN": "an expert; with /lambda=x: the base plus x times its task vector",
    "SIZE/SEED/DRIFT/N/METHOD/lambda=x": "N experts merged, what the method adds to the base scaled by x",
}


def main(argv: list[str] | None = None) -> None:
    """Train, merge and measure what is missing, then (or only) report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("run", "train", "report"), default="run")
    parser.add_argument("--sizes", nargs="+", help="default: d64 d128")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--drift", nargs="+", help="default: all")
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 2], help="how many are merged")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--dir", type=Path, default=DIR, help="models and tokens; kept, about 1 GB")
    parser.add_argument("--out", type=Path, default=OUT, help="results file, added to")
    parser.add_argument("--threads", type=int, default=1, help="two runs with one thread beat one run with two")
    parser.add_argument("--smoke", action="store_true", help="models too small to be good: does it work here?")
    options = parser.parse_args(argv)
    if options.command == "report":
        report.write(options.out)
        return
    settings = SMOKE if options.smoke else Settings()
    folder = options.dir / "smoke" if options.smoke else options.dir
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", file=sys.stderr, flush=True)

    torch.set_num_threads(options.threads)
    results = Shared(options.out, provenance(), ABOUT)
    drifts = options.drift or list(settings.drifts)
    for seed in options.seeds:
        for size in options.sizes or list(settings.sizes)[:2]:
            texts = corpus.load(folder / f"seed{seed}", seed, settings.amounts)
            trained = Trained(folder / f"seed{seed}", texts, settings, size, seed, say)
            unit = Unit(trained, texts, results, say)
            unit.train(drifts)
            if options.command == "run":
                unit.run(drifts, options.experts, options.methods)


if __name__ == "__main__":
    main()
