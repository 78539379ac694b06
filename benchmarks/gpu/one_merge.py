"""Merges in a process of its own, timed from the inside: ``python benchmarks/gpu/one_merge.py SPEC``.

SPEC is JSON: ``merges``, a list of ``{"recipe": ..., "out": folder, "options": {...}}`` as :func:`seme.merge` takes
them, which are run one after the other. Prints a line of JSON for each: ``startup_s`` (imports, and the first contact
with the GPU), ``seconds`` of the merge itself until the output is on disk, backend and device, the bytes read and
written, ``counted_gpu_bytes``, the most that the merge counted towards its limit, and ``peak_gpu_bytes``, the most that
torch's allocator held (None on the CPU); or ``error``, and the next merge goes on.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def run(spec: dict[str, Any]) -> None:
    """All merges of the list."""
    start = time.perf_counter()
    import seme

    on_gpu = any(m["options"].get("device", "cpu") != "cpu" for m in spec["merges"])
    if on_gpu:
        import torch

        torch.zeros(1, device="cuda")
    startup = time.perf_counter() - start
    for merge in spec["merges"]:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            done = seme.merge(merge["recipe"], merge["out"], **merge["options"])
        except Exception as e:
            print(json.dumps({"error": f"{type(e).__name__}: {str(e)[:500]}"}), flush=True)
            continue
        took = time.perf_counter() - start
        found = {
            "startup_s": startup,
            "seconds": took,
            "backend": done.backend,
            "device": done.device,
            "read": done.bytes_read,
            "written": done.bytes_written,
            "counted_gpu_bytes": done.gpu_bytes,
            "peak_gpu_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    run(json.loads(sys.argv[1]))
