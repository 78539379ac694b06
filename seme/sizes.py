"""Byte sizes as people write them."""

from __future__ import annotations

import re

from seme.errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str | int, where: str) -> int:
    """Bytes from ``2GiB``, ``500MB``, ``5B`` (billion, as in mergekit), ``4096``; ``where`` names the option."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    unit = match[2] if match else None
    if unit is not None and unit not in _UNITS and unit.endswith("b"):
        unit = unit[:-1]
    factor = {**_UNITS, **_BINARY}.get(unit) if unit is not None else None
    if match is None or factor is None:
        raise ConfigError(f"{where}: {text!r} is not a size; write e.g. 500MB, 2GiB or 5B")
    return int(float(match[1]) * factor)


def format_size(size: float) -> str:
    """``3.0 GB``: decimal units, three significant digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
