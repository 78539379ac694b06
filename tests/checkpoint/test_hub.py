"""seme/checkpoint/hub.py: local paths, and repositories through a stand-in for the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from seme.checkpoint.hub import ModelRef, local_path, resolve
from seme.errors import CheckpointError


class Hub:
    """The two calls of huggingface_hub that are used; records what is asked."""

    def __init__(self, folder: Path) -> None:
        self.files: list[str] | Exception = ["model.safetensors", "config.json", "pytorch_model.bin"]
        self.download: Exception | None = None
        self.cached: Path | None = None
        self.folder = folder
        self.asked: list[dict[str, Any]] = []

    def list_repo_files(self, repo: str, *, revision: str | None = None) -> list[str]:
        self.asked.append({"list": repo, "revision": revision})
        if isinstance(self.files, Exception):
            raise self.files
        return self.files

    def snapshot_download(self, repo: str, **options: Any) -> str:
        self.asked.append({"download": repo, **options})
        if options.get("local_files_only"):
            if self.cached is None:
                raise FileNotFoundError("nothing cached")
            return str(self.cached)
        if self.download is not None:
            raise self.download
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    return found


def test_a_local_path_never_asks_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(ModelRef("org/model")) == Path("org/model")
    assert resolve(ModelRef(str(tmp_path / "org"))) == tmp_path / "org"
    assert resolve(ModelRef("~/org/model")) == tmp_path / "org" / "model"
    assert hub.asked == []


@pytest.mark.parametrize("path", ["./none", "/none/at/all", "~/none", "a/b/c", "../x/y", "~nobody-of-this-name/x"])
def test_what_can_only_be_a_path_never_asks_the_hub(path: str, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=r": no such file or folder$"):
        resolve(ModelRef(path))
    assert hub.asked == []


def test_only_safetensors_are_fetched_where_there_are_any(hub: Hub) -> None:
    assert resolve(ModelRef("org/model", "v2")) == hub.folder
    listing, download = hub.asked
    assert listing == {"list": "org/model", "revision": "v2"}
    assert (download["download"], download["revision"]) == ("org/model", "v2")
    patterns = download["allow_patterns"]
    assert "*.safetensors" in patterns
    assert "*.bin" not in patterns
    assert {"*.json", "*.model", "*.jinja", "*.txt"} <= set(patterns)


def test_pickles_where_there_are_none(hub: Hub) -> None:
    hub.files = ["pytorch_model.bin", "config.json"]
    resolve(ModelRef("gpt2"))
    assert "*.bin" in hub.asked[1]["allow_patterns"]
    assert "*.safetensors" not in hub.asked[1]["allow_patterns"]
    assert hub.asked[1]["revision"] is None


def test_offline_the_cache_is_taken(hub: Hub, tmp_path: Path) -> None:
    hub.files = ConnectionError("no network")
    hub.cached = tmp_path / "cache"
    assert resolve(ModelRef("org/model", "v2")) == tmp_path / "cache"
    assert hub.asked[1] == {"download": "org/model", "revision": "v2", "local_files_only": True}


def test_without_a_cache_the_first_reason_is_given(hub: Hub) -> None:
    hub.files = RuntimeError("404 Client Error.\n\nRepository Not Found for url: x.")
    with pytest.raises(CheckpointError) as e:
        resolve(ModelRef("org/typo", "v1"))
    assert str(e.value) == (
        "org/typo@v1: neither a local folder nor a model the hub gives: "
        "404 Client Error. Repository Not Found for url: x."
    )


def test_a_download_that_fails_is_not_mistaken_for_being_offline(hub: Hub, tmp_path: Path) -> None:
    hub.download = OSError("connection reset")
    hub.cached = tmp_path  # half of the files
    with pytest.raises(CheckpointError, match=r"^org/model: .*: connection reset$"):
        resolve(ModelRef("org/model"))


def test_an_error_without_words(hub: Hub) -> None:
    hub.files = TimeoutError()
    with pytest.raises(CheckpointError, match=r": TimeoutError$"):
        resolve(ModelRef("org/model"))


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "~nobody-of-this-name", "no/such"])
def test_names_that_no_file_can_have(path: str) -> None:
    assert local_path(path) is None


def test_references_as_text() -> None:
    assert str(ModelRef("org/model")) == "org/model"
    assert str(ModelRef("org/model", "v2")) == "org/model@v2"
