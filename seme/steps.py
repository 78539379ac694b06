"""Several recipes in one file, of which later ones merge what others made.

Each document but one has a ``name``, under which the others may use its result as a model. That without a name (else
the last one) is the output; the results of the others are kept only while they are needed, unless a folder for them is
given.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seme import plan as planning
from seme.checkpoint import ModelRef, check_free
from seme.config import MergeConfig, documents, override, parse, with_models
from seme.errors import ConfigError, brief

Recipe = Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | Path


@dataclass(frozen=True)
class Step:
    """One of the recipes.

    Attributes:
        name: under which others use its result; None for the output.
        config: the recipe.
        needs: names of those whose results it uses.
    """

    name: str | None
    config: MergeConfig
    needs: tuple[str, ...]


def read(recipe: Recipe, **keys: Any) -> list[Step]:
    """The recipes of a file, each after those whose results it uses, the output last; mostly a single one.

    Args:
        recipe: as for :func:`seme.merge`.
        keys: top-level keys that overrule those of every recipe, if they are not None.

    Raises:
        ConfigError: a mistake in a recipe or a name, or recipes that need each other.
    """
    found = documents(recipe)
    if len(found) == 1:  # of which nobody asks for the name
        data = {k: v for k, v in found[0][0].items() if k != "name"}
        return [Step(None, override(parse(data, found[0][1]), **keys), ())]
    names = [_name(data, i) for i, (data, _) in enumerate(found)]
    unnamed = [i for i, name in enumerate(names) if name is None]
    if len(unnamed) > 1:
        raise ConfigError(
            f"document {unnamed[1] + 1}: name: missing, as in document {unnamed[0] + 1}; one is the output"
        )
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name in seen:
            raise ConfigError(f"document {i + 1}: name: {name} is given twice; choose another")
        seen.update([name] if name is not None else [])
    output = unnamed[0] if unnamed else len(found) - 1
    text = "---\n".join(source for _, source in found)
    steps: list[Step] = []
    for i, ((data, _), name) in enumerate(zip(found, names)):
        data = {k: v for k, v in data.items() if k != "name"}
        try:
            config = override(parse(*documents(data)[0]), **keys)
        except ConfigError as e:
            raise ConfigError(f"{name or f'document {i + 1}'}: {e}") from e
        used = {ref.path for ref in _models(config) if ref.revision is None}
        needs = tuple(n for n in names if n is not None and n in used)
        steps.append(Step(None if i == output else name, with_models(config, {}, text), needs))
    try:
        return _ordered(steps, [n or f"document {i + 1}" for i, n in enumerate(names)], output)
    except RecursionError:
        raise ConfigError(f"recipe: {len(found)} documents, too many that use each other's results") from None


def _name(data: Mapping[str, Any], i: int) -> str | None:
    name = data.get("name")
    if name is None:
        return None
    plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\@+") and name.strip(". ") == name
    if not plain or not name or name in ("base", "union"):
        raise ConfigError(
            f"document {i + 1}: name: {brief(name)}; expected a name without / @ +, and not base or union"
        )
    return str(name)


def _models(config: MergeConfig) -> Iterator[ModelRef]:
    """Every model that a recipe names."""
    tokenizer = config.tokenizer
    for ref in (
        *(e.ref for e in config.models),
        *(part.base_model for part in config.slices),
        config.base_model,
        *((tokenizer.source, *(rule.model for rule in tokenizer.tokens.values())) if tokenizer is not None else ()),
    ):
        if ref is not None:
            yield ref


def _ordered(steps: list[Step], names: list[str], output: int) -> list[Step]:
    """Each after those it needs, the output last."""
    number = {name: i for i, name in enumerate(names)}
    order: list[int] = []
    path: list[int] = []

    def visit(i: int) -> None:
        if i in path:
            circle = " -> ".join(names[k] for k in (*path[path.index(i) :], i))
            raise ConfigError(f"{names[i]}: its result is needed to make it: {circle}; break the circle")
        if i not in order:
            path.append(i)
            for need in steps[i].needs:
                visit(number[need])
            path.pop()
            order.append(i)

    for i in (*(k for k in range(len(steps)) if k != output), output):
        visit(i)
    if order[-1] != output:
        user = next(s.name for s in steps if names[output] in s.needs)
        raise ConfigError(f"{user}: uses {names[output]}, which is the output; give another document no name")
    return [steps[i] for i in order]


def check(steps: Sequence[Step], keep: Path | None) -> None:
    """Check all recipes as far as is possible before the first is run.

    Raises:
        SemeError: the first mistake found; a result that nothing uses and that is not kept is one.
    """
    made = {s.name for s in steps if s.name is not None}
    used = {name for s in steps for name in s.needs}
    for step in steps:
        if step.name is not None and step.name not in used and keep is None:
            raise ConfigError(f"{step.name}: nothing uses its result; use it, remove it, or keep it with --keep-steps")
        planning.check(step.config, made)
        if keep is not None and step.name is not None:
            check_free(keep / step.name, overwrite=False)


@contextmanager
def folder(out: Path, keep: Path | None) -> Iterator[Path]:
    """Where results are that are no output: ``keep``, else a folder beside the output that is removed at the end."""
    if keep is not None:
        yield keep
        return
    place = out.resolve().parent
    while not place.exists():
        place = place.parent
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.seme-steps-", dir=place))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def run(
    steps: Sequence[Step], where: Path, keep: Path | None, merge: Callable[[MergeConfig, str | None, Path], Any]
) -> Any:
    """Run them in their order; a result is removed after its last use, unless it is kept.

    Args:
        steps: in the order of :func:`read`.
        where: the folder of results.
        keep: that folder, if it stays.
        merge: makes one: the recipe, its name (None: the output), and the folder of its result.

    Returns:
        What ``merge`` gave for the output.
    """
    result = None
    for i, step in enumerate(steps):
        models = {name: ModelRef(str(where / name), label=name) for name in step.needs}
        config = with_models(step.config, models, step.config.source)
        result = merge(config, step.name, where / (step.name or ""))
        later = {name for s in steps[i + 1 :] for name in s.needs}
        for name in step.needs if keep is None else ():
            if name not in later:
                shutil.rmtree(where / name, ignore_errors=True)
    return result
