"""Merge methods: one file each. ``seme methods`` lists them; see CONTRIBUTING.md for how to add one."""

from seme.methods._passes import Countdown, Group, Merge, Pass, Reduced
from seme.methods._registry import Method, Param, PerExpert, PerModel, get, method, methods

__all__ = [
    "Countdown",
    "Group",
    "Merge",
    "Method",
    "Param",
    "Pass",
    "PerExpert",
    "PerModel",
    "Reduced",
    "get",
    "method",
    "methods",
]
