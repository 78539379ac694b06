"""seme/checkpoint/descriptors.py: fewer open files than shards, and none closed under who uses it."""

from __future__ import annotations

import os
import resource
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from seme.checkpoint import descriptors
from seme.checkpoint.descriptors import Descriptors


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Nine files that hold their number; three may be open."""
    monkeypatch.setattr(descriptors, "MOST", 3)
    monkeypatch.setattr(Descriptors, "_open", {})
    paths = [tmp_path / str(i) for i in range(9)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    return paths


def opened(files: list[Path]) -> set[str]:
    links = (Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return {path.name for path in (Path(os.readlink(link)) for link in links if link.exists()) if path in files}


def test_the_least_recently_used_are_closed(files: list[Path]) -> None:
    one, other = Descriptors(os.O_RDONLY), Descriptors(os.O_RDONLY)
    for i, expected in ((0, "0"), (1, "01"), (2, "012"), (0, "012"), (3, "023"), (4, "034"), (0, "034"), (5, "045")):
        with (one, other)[i % 2].use(files[i]) as descriptor:
            assert os.pread(descriptor, 9, 0) == bytes([i])
        assert opened(files) == set(expected)
    one.close()
    assert opened(files) == {"5"}
    other.close()
    assert opened(files) == set()


def test_half_of_what_the_process_may_have(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "MOST", 100)
    for limit, most in ((4, 2), (1, 1), (resource.RLIM_INFINITY, 9), (10**6, 9)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        some = Descriptors(os.O_RDONLY)
        for path in files:
            with some.use(path):
                pass
        assert len(opened(files)) == most
        some.close()


def test_those_in_use_stay_open(files: list[Path]) -> None:
    some = Descriptors(os.O_RDONLY)
    with ExitStack() as using:
        held = [using.enter_context(some.use(path)) for path in files]
        assert opened(files) == set("012345678")
        some.close()
        assert [os.pread(descriptor, 9, 0) for descriptor in held] == [bytes([i]) for i in range(9)]
    assert opened(files) == set()
    assert not any(is_open(descriptor) for descriptor in held)


def test_one_that_two_use_is_closed_after_the_second(files: list[Path]) -> None:
    some = Descriptors(os.O_RDONLY)
    with some.use(files[0]) as first:
        with some.use(files[0]) as second:
            assert first == second
            some.close()
        assert is_open(first)
        with some.use(files[0]) as again:  # opened anew meanwhile
            assert again != first
    assert not is_open(first)
    assert opened(files) == {"0"}
    some.close()


def test_many_threads(files: list[Path]) -> None:
    some, wrong = Descriptors(os.O_RDONLY), []

    def work(k: int) -> None:
        for step in range(400):
            i = (step * (k + 1)) % 9
            with some.use(files[i]) as descriptor:
                if os.pread(descriptor, 9, 0) != bytes([i]):
                    wrong.append((k, i))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(opened(files)) <= 8
    some.close()
    assert opened(files) == set()


def test_closing_while_the_lock_is_held_does_not_wait(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the garbage collector runs in :meth:`Descriptors.use`, and finds a checkpoint nobody has any more."""
    gone, used = Descriptors(os.O_RDONLY), Descriptors(os.O_RDONLY)
    with gone.use(files[0]):
        pass
    plain = os.open

    def open_and_collect(path: Path, flags: int) -> int:
        gone.close()
        return plain(path, flags)

    monkeypatch.setattr(os, "open", open_and_collect)
    found: list[set[str]] = []

    def work() -> None:
        with used.use(files[1]):
            found.append(opened(files))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(20)
    assert found == [{"1"}]
    used.close()
