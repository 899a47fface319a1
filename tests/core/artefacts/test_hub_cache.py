"""Models in the Hugging Face cache: found by name and revision, without the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_caches import COMMIT, cache_model

from expertctl.core.artefacts.hub_cache import (
    cached_model,
    download_command,
    is_hub_name,
    split_commit,
    split_revision,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_model_is_found_by_branch_tag_and_commit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cache_model(monkeypatch, model, "owner/name", refs=("main", "v1"))
    for revision in (None, "main", "v1", COMMIT):
        assert cached_model("owner/name", revision) == snapshot
    assert snapshot.name == COMMIT
    for name, revision in (("owner/name", "v2"), ("owner/other", None), ("owner/name", "0" * 40)):
        assert cached_model(name, revision) is None


@pytest.mark.parametrize("name", ["", "/absolute/path", "a/b/c", "..", "~/x", "a//b", "a@b", "a b"])
def test_names_that_no_model_can_have_are_not_found(name: str) -> None:
    assert cached_model(name) is None
    assert not is_hub_name(name)


def test_a_model_without_all_its_weights_is_not_found(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    weights = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    snapshot = cache_model(monkeypatch, model, "owner/name")
    assert cached_model("owner/name") is None
    (snapshot / weights["y"]).write_bytes(b"")
    assert cached_model("owner/name") == snapshot
    (snapshot / "model.safetensors.index.json").unlink()
    for file in weights.values():
        (snapshot / file).unlink()
    assert cached_model("owner/name") is None


def test_an_adapter_is_a_model_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "config.json").rename(model / "adapter_config.json")
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    assert cached_model("owner/name") is None
    snapshot = cache_model(monkeypatch, model, "owner/name")
    assert cached_model("owner/name") == snapshot


def test_references_and_commands() -> None:
    assert split_revision("owner/name@v1") == ("owner/name", "v1")
    assert split_revision("owner/name") == ("owner/name", None)
    assert split_commit(f"owner/name@{COMMIT}") == ("owner/name", COMMIT)
    assert split_commit("owner/name@v1") is None
    assert download_command("owner/name") == "hf download owner/name"
    assert download_command("owner/name", "v1") == "hf download owner/name --revision v1"
