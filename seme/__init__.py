"""seme merges language models without data and without training."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout the Triton kernels lie beside this package, in kernels/; there they are seme.kernels as well.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "__init__.py").is_file():
    __path__.append(str(_checkout))
