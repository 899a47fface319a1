"""Digests of files that have no manifest, remembered for as long as the files are untouched.

Hashing is half of what a merge of other people's checkpoints costs. A file counts as untouched while path, size,
inode and time of change are the same, which is what git trusts; a file that changed in the last seconds is not
remembered, since it could change again within the clock's resolution. Artefacts with a manifest are never looked up
here: their bytes are checked whenever they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError
from .files import write_text
from .safetensors_io import Checkpoint

SETTLED_SECONDS = 2.0


def cached_digests(file: Path) -> dict[str, str]:
    """Return the digests of a safetensors file's tensors by name, empty where nothing is remembered."""
    try:
        content = json.loads(_place(file).read_text(encoding="utf-8"))
        if content["stat"] == _stat(file):
            return dict(content["tensors"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or not ours: it is only a cache
    return {}


def remember_digests(file: Path, tensors: Mapping[str, str]) -> None:
    """Remember digests, added to those that are known already; a cache that cannot be written is no trouble."""
    try:
        stat = _stat(file)
        if time.time() - max(stat[2], stat[3]) / 1e9 < SETTLED_SECONDS:
            return
        known = cached_digests(file)
        if known | dict(tensors) == known:
            return
        place = _place(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, json.dumps({"stat": stat, "tensors": known | dict(tensors)}))
    except (OSError, UserError):
        return


def digests_of_untouched(checkpoint: Checkpoint, known: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of all tensors of a checkpoint, hashing only those that are neither known nor remembered."""
    files = {entry.file for entry in checkpoint.entries.values()}
    remembered = {file: cached_digests(file) for file in files}
    found = {
        name: digest
        for name, entry in checkpoint.entries.items()
        if (digest := known.get(name) or remembered[entry.file].get(name)) is not None
    }
    hashed = checkpoint.digests(set(checkpoint.entries) - set(found))
    for file in files:
        remember_digests(
            file, {name: hashed[name] for name in hashed if checkpoint.entries[name].file == file}
        )
    return found | hashed


def _stat(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _place(file: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = hashlib.sha256(str(file.resolve()).encode()).hexdigest()
    return Path(base).expanduser() / "expertctl" / "digests" / f"{name}.json"
