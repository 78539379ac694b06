"""Regular expressions that a recipe or an adapter brings along, searched in names of tensors in bounded time.

Python's matcher goes back over what it tried, and for some expressions, such as ``(a+)+$``, does so for years. Those
that may be such ones are searched in another process, which has a second of CPU time.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Collection, Sequence

SECONDS = 1
"""CPU time for the expressions of one call."""

_SEARCH = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    print(json.dumps([re.search(pattern, name) is not None for name in names]), flush=True)
"""


class TooSlow(Exception):
    """An expression whose search did not end; ``number`` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_BEFORE, _BEHIND = r"\A(.*\.)?(", ")$"


def ending(pattern: str) -> str:
    """An expression for names that match ``pattern`` as a whole, or after one of their dots."""
    return f"{_BEFORE}{pattern}{_BEHIND}"


def quick(pattern: str) -> bool:
    """True if a search takes at most about the square of the name's length: one repetition, of one character."""
    pattern = pattern.removeprefix(_BEFORE).removesuffix(_BEHIND)
    return len(pattern) <= 200 and not set(pattern) & set("(|?{") and sum(map(pattern.count, "*+")) <= 1


def search(patterns: Sequence[str], names: Collection[str]) -> list[frozenset[str]]:
    """For each regular expression the names in which it is found.

    Raises:
        TooSlow: the search for one did not end.
        re.error: one is no regular expression.
    """
    short = max(map(len, names), default=0) <= 500
    found: list[frozenset[str] | None] = [
        frozenset(filter(re.compile(p).search, names)) if short and quick(p) else None for p in patterns
    ]
    left = [i for i, names_ in enumerate(found) if names_ is None]
    if left:
        try:
            apart = _apart(tuple(patterns[i] for i in left), tuple(names))
        except TooSlow as e:
            raise TooSlow(left[e.number]) from None
        for i, names_ in zip(left, apart):
            found[i] = names_
    return [names_ or frozenset() for names_ in found]


@functools.lru_cache(8)
def _apart(patterns: tuple[str, ...], names: tuple[str, ...]) -> list[frozenset[str]]:
    """As :func:`search`, in another process."""
    for pattern in patterns:
        re.compile(pattern)
    done = subprocess.run(
        [sys.executable, "-I", "-c", _SEARCH], input=json.dumps([patterns, names]), capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    if done.returncode:
        raise TooSlow(min(len(lines), len(patterns) - 1))
    return [frozenset(name for name, hit in zip(names, json.loads(line)) if hit) for line in lines]
