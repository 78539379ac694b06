"""seme merges language models without data and without training.

The public API: :func:`merge`, :func:`merge_state_dicts`, :func:`verify`, :class:`SemanticBases`, and the packages
:mod:`seme.methods`, :mod:`seme.ops` and :mod:`seme.semantics`. Importing it loads neither torch nor transformers; what
a call needs is imported by the call.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seme.errors import SemeError
    from seme.merging import MergeResult, merge
    from seme.semantics.bases import SemanticBases
    from seme.state_dicts import merge_state_dicts
    from seme.verifying import VerifyReport, verify

__version__ = "0.1.0"
__all__ = [
    "MergeResult",
    "SemanticBases",
    "SemeError",
    "VerifyReport",
    "__version__",
    "merge",
    "merge_state_dicts",
    "verify",
]

_HOME = {
    "MergeResult": "seme.merging",
    "SemanticBases": "seme.semantics.bases",
    "SemeError": "seme.errors",
    "VerifyReport": "seme.verifying",
    "merge": "seme.merging",
    "merge_state_dicts": "seme.state_dicts",
    "verify": "seme.verifying",
}

# In a checkout the Triton kernels lie beside this package, in kernels/; there they are seme.kernels as well.
# (An installed package has its own, and what lies beside that is other people's.)
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'seme' has no attribute {name!r}")
    return getattr(_import_module(_HOME[name]), name)
