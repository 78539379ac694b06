"""seme/checkpoint/hub.py: local paths, and repositories through a stand-in for the hub."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.errors
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

    def model_info(self, repo: str, *, revision: str | None, timeout: float) -> Any:
        self.asked.append({"info": repo, "revision": revision})
        assert 0 < timeout < 30
        logging.getLogger("huggingface_hub").warning("chatter")
        if isinstance(self.files, Exception):
            raise self.files
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=f) for f in self.files])

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
    where = "" if path[0] in "/~" else f" in {Path.cwd()}"
    with pytest.raises(CheckpointError) as e:
        resolve(ModelRef(path))
    assert str(e.value) == f"{path}: no such file or folder{where}; correct the path"
    assert hub.asked == []


def test_a_name_below_a_folder_that_is_here_never_asks_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointError) as e:
        resolve(ModelRef("models/typo"))
    assert str(e.value) == (
        f"models/typo: no such file or folder in {tmp_path}, models is there; "
        "correct the path, or run where no models is to take the model from the hub"
    )
    assert hub.asked == []


def test_a_local_path_has_no_revision(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is here, as a local path without revisions; leave the revision out"):
        resolve(ModelRef(str(tmp_path), "v2"))
    assert hub.asked == []


def test_only_safetensors_are_fetched_where_there_are_any(hub: Hub) -> None:
    assert resolve(ModelRef("org/model", "v2")) == hub.folder
    listing, download = hub.asked
    assert listing == {"info": "org/model", "revision": "v2"}
    assert (download["download"], download["revision"]) == ("org/model", "v2")
    patterns = download["allow_patterns"]
    assert "model.safetensors" in patterns
    assert "pytorch_model.bin" not in patterns
    assert {"*.json", "*.model", "*.jinja", "*.txt"} <= set(patterns)


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        (["consolidated.safetensors", "model.safetensors", "onnx/model.safetensors"], ["model.safetensors"]),
        (
            [
                "consolidated.safetensors",
                "consolidated-00001-of-00002.safetensors",
                "model-1.safetensors",
                "model-2.safetensors",
                "model.safetensors.index.json",
                "original/x.safetensors",
                "pytorch_model.bin",
            ],
            ["model-1.safetensors", "model-2.safetensors"],
        ),
        (["p-1.bin", "p-2.bin", "pytorch_model.bin.index.json", "sub/x.bin"], ["p-1.bin", "p-2.bin"]),
        (["adapter_model.safetensors", "x.safetensors"], ["adapter_model.safetensors"]),
    ],
)
def test_weights_that_are_there_twice_are_fetched_once(files: list[str], fetched: list[str], hub: Hub) -> None:
    hub.files = files
    resolve(ModelRef("org/model"))
    assert [p for p in hub.asked[1]["allow_patterns"] if p.endswith((".safetensors", ".bin"))] == fetched


def test_pickles_where_there_are_none(hub: Hub) -> None:
    hub.files = ["pytorch_model.bin", "config.json"]
    resolve(ModelRef("gpt2"))
    assert "pytorch_model.bin" in hub.asked[1]["allow_patterns"]
    assert hub.asked[1]["revision"] is None


def test_offline_the_cache_is_taken(hub: Hub, tmp_path: Path) -> None:
    hub.files = ConnectionError("no network")
    hub.cached = tmp_path / "cache"
    assert resolve(ModelRef("org/model", "v2")) == tmp_path / "cache"
    asked = hub.asked[1]
    # A hub client that knows the repository's files wants all of them, unless told which.
    assert "model*.safetensors" in asked.pop("allow_patterns")
    assert asked == {"download": "org/model", "revision": "v2", "local_files_only": True}


def test_without_a_cache_the_first_reason_is_given(hub: Hub) -> None:
    hub.files = ConnectionError("Name or service\n\nnot known")
    with pytest.raises(CheckpointError) as e:
        resolve(ModelRef("org/typo", "v1"))
    assert str(e.value) == (
        f"org/typo@v1: no such folder in {Path.cwd()}, and the hub was not reached (Name or service not known); "
        "correct the path, or see to the network for a model of the hub"
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("RepositoryNotFoundError", "the hub has no such model, or a private one; correct the path or the name, or"),
        ("GatedRepoError", "the hub gives the model only to who accepted its terms; accept them there and run"),
        ("RevisionNotFoundError", "the hub has no such revision of the model; correct the revision"),
        ("HFValidationError", "the hub has no such model"),
    ],
)
def test_what_the_hub_refuses_is_told_with_a_remedy(error: str, words: str, hub: Hub) -> None:
    kind = getattr(huggingface_hub.errors, error)
    hub.files = kind.__new__(kind)  # their arguments differ between versions
    with pytest.raises(CheckpointError) as e:
        resolve(ModelRef("typo"))
    assert str(e.value).startswith(f"typo: no such folder in {Path.cwd()}, and {words}")


def test_the_hubs_client_prints_nothing_and_is_left_as_it_was(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("huggingface_hub")
    log.addHandler(caplog.handler)
    level = log.level
    try:
        hub.files = ConnectionError("no network")
        with pytest.raises(CheckpointError):
            resolve(ModelRef("typo"))
    finally:
        log.removeHandler(caplog.handler)
    assert caplog.text == ""
    assert log.level == level


def test_a_download_that_fails_is_not_mistaken_for_being_offline(hub: Hub, tmp_path: Path) -> None:
    hub.download = OSError("connection reset")
    hub.cached = tmp_path  # half of the files
    with pytest.raises(
        CheckpointError,
        match=r"^org/model: the download failed: connection reset; run again, what is complete is kept$",
    ):
        resolve(ModelRef("org/model"))


def test_an_error_without_words(hub: Hub) -> None:
    hub.files = TimeoutError()
    with pytest.raises(CheckpointError, match=r" \(TimeoutError\); correct the path, "):
        resolve(ModelRef("org/model"))


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "~nobody-of-this-name", "no/such"])
def test_names_that_no_file_can_have(path: str) -> None:
    assert local_path(path) is None


def test_references_as_text() -> None:
    assert str(ModelRef("org/model")) == "org/model"
    assert str(ModelRef("org/model", "v2")) == "org/model@v2"
