"""Triton kernels, imported as ``seme.kernels``: one file per op, named as the op, with a ``launch`` function.

Importing this package has no side effects and only ``numeric.py`` casts to or from bfloat16.
"""
