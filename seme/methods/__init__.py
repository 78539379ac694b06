"""Merge methods: one file each. ``seme methods`` lists them; see CONTRIBUTING.md for how to add one."""

from seme.methods._matrix import Context, Matrix, Stack
from seme.methods._passes import Countdown, Group, Merge, Pass, Reduced
from seme.methods._registry import Method, Param, PerExpert, PerModel, get, method, methods

__all__ = [
    "Context",
    "Countdown",
    "Group",
    "Matrix",
    "Merge",
    "Method",
    "Param",
    "Pass",
    "PerExpert",
    "PerModel",
    "Reduced",
    "Stack",
    "get",
    "method",
    "methods",
]
