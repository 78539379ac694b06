"""Benchmarks: ``python -m benchmarks.merge``, ``python -m benchmarks.ops``; see ``docs/benchmarks.md``."""
