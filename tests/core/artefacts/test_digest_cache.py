"""Remembering digests of files without a manifest: only as long as nobody touched them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from expertctl.core.artefacts import digest_cache
from expertctl.core.artefacts.digest_cache import cached_digests, digests_of_untouched, remember_digests
from expertctl.core.artefacts.safetensors_io import Checkpoint, write_tensors


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_cache, "SETTLED_SECONDS", 0.0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def test_new_digests_join_the_cached_ones(file: Path) -> None:
    assert cached_digests(file) == {}
    remember_digests(file, {"a": "1"})
    remember_digests(file, {"b": "2"})
    assert cached_digests(file) == {"a": "1", "b": "2"}


def test_a_file_that_was_touched_is_forgotten(file: Path) -> None:
    remember_digests(file, {"a": "1"})
    later = time.time_ns() + 10**9
    os.utime(file, ns=(later, later))
    assert cached_digests(file) == {}
    remember_digests(file, {"a": "3"})
    file.write_bytes(b"weighst")
    assert cached_digests(file) == {}


def test_a_file_that_just_changed_is_not_remembered(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "SETTLED_SECONDS", 60.0)
    remember_digests(file, {"a": "1"})
    assert cached_digests(file) == {}


def test_a_damaged_cache_and_one_that_cannot_be_written_are_no_trouble(file: Path, tmp_path: Path) -> None:
    remember_digests(file, {"a": "1"})
    (place,) = (tmp_path / "cache" / "expertctl" / "digests").iterdir()
    place.write_text("{broken")
    assert cached_digests(file) == {}
    place.unlink()
    place.parent.rmdir()
    place.parent.write_text("no folder")
    remember_digests(file, {"a": "1"})
    assert cached_digests(file) == {}


def test_a_folder_is_hashed_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(file, {"a": torch.ones(3), "b": torch.zeros(2)})
    checkpoint = Checkpoint([file])
    expected = checkpoint.digests()
    hashed: list[str] = []
    digest = Checkpoint.digest
    monkeypatch.setattr(Checkpoint, "digest", lambda self, name: (hashed.append(name), digest(self, name))[1])
    assert digests_of_untouched(checkpoint, {"a": expected["a"]}) == expected
    assert hashed == ["b"]
    assert digests_of_untouched(checkpoint, {"a": expected["a"]}) == expected
    assert hashed == ["b"]
    write_tensors(file, {"a": torch.ones(3), "b": torch.ones(2)})
    assert digests_of_untouched(Checkpoint([file]), {})["b"] != expected["b"]
