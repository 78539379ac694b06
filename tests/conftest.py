"""Triton kernels run in its interpreter where there is no GPU. It has to know before its first import."""

import importlib.util
import os
import signal
import tempfile

import pytest
import torch

from .differential.summary import pytest_sessionfinish, pytest_terminal_summary, pytest_testnodedown  # noqa: F401

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _patched_once():
    """Triton's interpreter replaces its language when a kernel begins, and again at each function that the kernel
    calls, which takes longer than what most functions do; here once for each module of the language."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    replace, done = interpreter._patch_lang, set()

    def replace_once(function):
        if language.core.is_builtin(language.load):  # a kernel begins
            done.clear()
        used = {v.__name__ for v in function.__globals__.values() if v is language or v is language.core}
        if used <= done:
            return interpreter._LangPatchScope()
        done.update(used)
        return replace(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield


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
