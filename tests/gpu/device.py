"""Where the tests of this folder run: on a GPU, with every backend there is, or on the CPU in Triton's interpreter.

The bodies are the same. On the CPU sizes are small and the calls few: that shows that the tests themselves are right.
"""

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BACKENDS = ("triton", "cuda") if GPU else ("triton",)

needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA GPU here")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs here")


def chosen(on_gpu, on_cpu):
    """What a test goes through."""
    return on_gpu if GPU else on_cpu


def needs_memory(gigabytes):
    """Skips on a GPU without that much free memory."""
    torch.cuda.empty_cache()
    if GPU and torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")
