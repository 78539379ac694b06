"""seme/sizes.py: byte sizes as people write them."""

from __future__ import annotations

from typing import Any

import pytest

from seme.errors import ConfigError
from seme.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        (1e9, 10**9),
        ("4096", 4096),
        ("1k", 1000),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("500MB", 500 * 10**6),
        ("2GiB", 2 << 30),
        (" 1.5 gib ", 3 << 29),
        ("5B", 5 * 10**9),
        ("5g", 5 * 10**9),
        ("0.25TB", 25 * 10**10),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes(text: str | float, size: int) -> None:
    assert parse_size(text, "x") == size


@pytest.mark.parametrize(
    "text", ["", "MB", "1 2", "-1", "-1GB", "1e9", "5 XB", "GiB2", "1.5.2", "0", "0.1", 0, -5, "9" * 400, True, None]
)
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"^--memory: .* is not a size; write e.g. 500MB, 2GiB or 5B$"):
        parse_size(text, "--memory")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_550_000, "1.6 MB"), (3e9, "3.0 GB"), (5e15, "5000.0 TB")],
)
def test_written_sizes(size: float, text: str) -> None:
    assert format_size(size) == text
