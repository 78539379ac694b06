"""Triton kernels run in its interpreter where there is no GPU. It has to know before its first import."""

import os
import tempfile

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Nothing that a test computes is found by the next run, or left in the cache of the person who runs them.
_CACHE = tempfile.TemporaryDirectory(prefix="seme-tests-")
os.environ["SEME_CACHE"] = _CACHE.name


def pytest_configure(config):
    config.addinivalue_line("markers", "large: needs tens of gigabytes")
