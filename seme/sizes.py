"""Byte sizes as people write them."""

from __future__ import annotations

import re

from seme.errors import ConfigError, brief

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(size: str | float, where: str) -> int:
    """Bytes from ``2GiB``, ``500MB``, ``5B`` (billion, as in mergekit), ``4096``; ``where`` names the option.

    Raises:
        ConfigError: not a size, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)\s*", str(size).lower())
    unit = match[2] if match else ""
    if unit not in _UNITS and unit.endswith("b"):
        unit = unit[:-1]
    factor = {**_UNITS, **_BINARY}.get(unit)
    found = int(float(match[1]) * factor) if match and factor else 0
    if found < 1:
        raise ConfigError(f"{where}: {brief(size)} is not a size; write e.g. 500MB, 2GiB or 5B")
    return found


def format_size(size: float) -> str:
    """``3.0 GB``: decimal units, one digit after the point."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError
