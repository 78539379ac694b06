"""Triton kernels run in its interpreter where there is no GPU. It has to know before its first import."""

import os
import signal
import tempfile

import pytest
import torch

from .differential.summary import pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown  # noqa: F401

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Nothing that a test computes is found by the next run, or left in the cache of the person who runs them.
_CACHE = tempfile.TemporaryDirectory(prefix="seme-tests-")
os.environ["SEME_CACHE"] = _CACHE.name


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job; some tests raise it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.addinivalue_line("markers", "large: needs tens of gigabytes")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """With several processes a file stays in one of them, and what compiles the same kernels in the same one."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ())) if item.path.parent.name == "kernels" else set()
        group = next((name for name in ("compiled", "built", "emulation") if name in fixtures), item.path.as_posix())
        item.add_marker(pytest.mark.xdist_group("compiled" if group == "built" else group))
