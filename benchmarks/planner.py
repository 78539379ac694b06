"""What an engine does before it merges, as a process of its own.

``python -m benchmarks.planner ENGINE WHAT RECIPE OUT`` with ENGINE ``seme`` or ``mergekit`` and WHAT one of

- ``plan``: everything from the recipe's text to a plan that is ready to run, headers and indexes included;
- ``align``: only the tokenizers: from their files to the output's tokens, and to the place that each has in each model.

Prints JSON: ``import_s``, CPU seconds of the start of Python and of importing the engine; ``cpu_s`` and ``wall_s`` of
what was asked for. mergekit's warnings and bars go to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

Work = Callable[[], object]


def seme(what: str, recipe: Path, out: Path) -> Work:
    """What ``seme merge`` does."""
    import numpy  # noqa: F401  alignment imports it

    from seme import plan, vocabulary
    from seme.checkpoint import resolve
    from seme.config import load

    if what == "plan":
        return lambda: plan.make(load(recipe), out)
    config = load(recipe)
    refs = [entry.ref for entry in config.sections[0].slices[0].entries]
    folders = [resolve(ref) for ref in refs]
    rows = tuple(json.loads((folder / "config.json").read_text())["vocab_size"] for folder in folders)

    def align() -> object:
        assert config.tokenizer is not None
        found = vocabulary.align(config.tokenizer, refs, folders, rows, 0)
        return found, found.sources(tuple(range(len(refs))), None, rows)

    return align


def mergekit(what: str, recipe: Path, out: Path) -> Work:
    """What ``mergekit-yaml`` does, by way of its Python API."""
    import yaml
    from mergekit import merge
    from mergekit.config import MergeConfiguration
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    options = MergeOptions()

    def plan() -> MergePlanner:
        config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
        architecture = merge.get_architecture_info(config, options)
        cache = LoaderCache()
        cache.setup(options=options)
        settings = merge._model_out_config(config, architecture)
        for model in config.referenced_models():
            cache.get(model)
        return MergePlanner(config, architecture, options=options, out_model_config=settings)

    if what == "plan":
        return lambda: Executor(targets=plan().plan_to_disk(out_path=str(out)))
    import transformers.models.auto.tokenization_auto  # noqa: F401  loaded at its first use

    task = plan()._tokenizer_task
    assert task is not None
    return task.execute


def main() -> None:
    """Command line."""
    engine, what, recipe, out = sys.argv[1:]
    work = {"seme": seme, "mergekit": mergekit}[engine](what, Path(recipe), Path(out))
    before, start = time.process_time(), time.perf_counter()
    work()
    found = {"import_s": before, "cpu_s": time.process_time() - before, "wall_s": time.perf_counter() - start}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
