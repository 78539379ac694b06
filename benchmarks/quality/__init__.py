"""Quality of merges: small models trained on the spot, merged by every method, measured on held-out text.

``python -m benchmarks.quality`` does all of it, offline and resumable; ``docs/quality.md`` has the result.
"""
