"""Models of the Hugging Face hub that are in the local cache; nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from .files import read_json

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PINNED = re.compile(r"(?P<name>[^@]+)@(?P<commit>[0-9a-f]{40})")
_MODEL_FILES = ("config.json", "adapter_config.json")
_INDEX = "model.safetensors.index.json"


def is_hub_name(name: str) -> bool:
    """Return whether a name has the form `owner/name` of models on the hub."""
    return _HUB_NAME.fullmatch(name) is not None


def split_revision(reference: str) -> tuple[str, str | None]:
    """Return name and revision of `NAME@REVISION`; the revision is None if there is none."""
    name, _, revision = reference.partition("@")
    return name, revision or None


def split_commit(reference: str) -> tuple[str, str] | None:
    """Return name and commit of `owner/name@commit`; None for every other text."""
    match = _PINNED.fullmatch(reference)
    return (match["name"], match["commit"]) if match is not None else None


def cached_model(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model in the cache, None if it is not there or not complete.

    The folder is named after the commit. `revision` is a branch, a tag or a commit; None: `main`.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in _MODEL_FILES:
        try:
            path = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:
            return None
        if isinstance(path, str) and _has_weights(Path(path).parent):
            return Path(path).parent
    return None


def download_command(name: str, revision: str | None = None) -> str:
    """Return the command that downloads a model into the cache."""
    return f"hf download {name}" + (f" --revision {revision}" if revision is not None else "")


def _has_weights(folder: Path) -> bool:
    if (folder / _INDEX).is_file():
        files = set(read_json(folder / _INDEX).get("weight_map", {}).values())
        return all((folder / file).is_file() for file in files)
    return any(file.is_file() for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
