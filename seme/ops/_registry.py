"""All ops by name. A new op is one file of this package; it is found here by its module-level ``OP``."""

from __future__ import annotations

import importlib
import pkgutil

from seme.ops._matrix import MatrixOp
from seme.ops._op import Op


def _discover() -> list[Op | MatrixOp]:
    import seme.ops

    names = [info.name for info in pkgutil.iter_modules(seme.ops.__path__)]
    files = [name for name in names if not name.startswith("_") and name not in ("library", "cuda")]
    return [importlib.import_module(f"seme.ops.{name}").OP for name in files]


_FOUND = _discover()
OPS: dict[str, Op] = {op.name: op for op in _FOUND if isinstance(op, Op)}
"""Element-wise ops and reductions: flat tensors, equal to the bit on every backend."""
MATRIX_OPS: dict[str, MatrixOp] = {op.name: op for op in _FOUND if isinstance(op, MatrixOp)}
"""Matrix ops: 2-D tensors, held to an error bound."""
