"""A Hugging Face cache with models from local folders, laid out as `hf download` does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest

COMMIT = hashlib.sha1(b"a commit", usedforsecurity=False).hexdigest()


def cache_model(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, commit: str = COMMIT, refs: Sequence[str] = ("main",)
) -> Path:
    """Put a folder into a cache beside it under a name of the hub, use that cache, and return the snapshot."""
    cache = folder.parent / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for part in ("blobs", "refs"):
        (repository / part).mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for ref in refs:
        (repository / "refs" / ref).write_text(commit)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{commit}-{number}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return snapshot
