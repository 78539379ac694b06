"""Backends, and a share of the tests for each of several processes (``SEME_TEST_SHARE=0/6``)."""

import importlib.util
import os

import pytest
import torch

from seme import native

from .device import BACKENDS, GPU


def pytest_configure(config):
    config.addinivalue_line("markers", "sanitize: short, and run under compute-sanitizer as well")


def pytest_collection_modifyitems(config, items):
    number, _, of = os.environ.get("SEME_TEST_SHARE", "0/1").partition("/")
    mine = items[int(number) :: int(of)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
    items[:] = mine


@pytest.fixture(params=BACKENDS)
def backend(request):
    """A backend that works here."""
    if request.param == "cuda" and native.why_not("_C_cuda") is not None:
        pytest.skip(f"seme._C_cuda: {native.why_not('_C_cuda')}")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if native.why_not("_C") is not None:
        pytest.skip(f"seme._C: {native.why_not('_C')}")
    return request.param


@pytest.fixture(autouse=True)
def _memory_is_freed():
    yield
    if GPU:
        torch.cuda.empty_cache()
