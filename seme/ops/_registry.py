"""All ops by name. A new op is one file of this package; it is found here by its module-level ``OP``."""

from __future__ import annotations

import importlib
import pkgutil

from seme.ops._op import Op


def _discover() -> dict[str, Op]:
    import seme.ops

    found = {}
    for info in pkgutil.iter_modules(seme.ops.__path__):
        if not info.name.startswith("_") and info.name not in ("library", "cuda"):
            op: Op = importlib.import_module(f"seme.ops.{info.name}").OP
            found[op.name] = op
    return found


OPS: dict[str, Op] = _discover()
