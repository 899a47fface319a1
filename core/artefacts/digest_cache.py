"""Cache of tensor digests for files without a manifest.

Hashing takes half the time of merging third-party checkpoints. A cache entry is valid while path, size, inode and
change times are the same, the criterion that git uses; a file that changed within the last seconds is not cached,
since it could change again within the clock's resolution. Artefacts with a manifest are never cached: their bytes
are verified on every read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError
from .files import cache_file, write_text
from .safetensors_io import Checkpoint

SETTLED_SECONDS = 2.0


def cached_digests(file: Path) -> dict[str, str]:
    """Return the cached digests of a safetensors file's tensors by name, empty if the file is not cached."""
    try:
        content = json.loads(cache_file(file, "digests", ".json").read_text(encoding="utf-8"))
        if content["stat"] == _stat(file):
            return dict(content["tensors"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing or unreadable: the caller hashes the file again
    return {}


def remember_digests(file: Path, tensors: Mapping[str, str]) -> None:
    """Add digests to the cache entry of `file`; does nothing if the cache cannot be written."""
    try:
        stat = _stat(file)
        if time.time() - max(stat[2], stat[3]) / 1e9 < SETTLED_SECONDS:
            return
        cached = cached_digests(file)
        if cached | dict(tensors) == cached:
            return
        path = cache_file(file, "digests", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"stat": stat, "tensors": cached | dict(tensors)}))
    except (OSError, UserError):
        return


def digests_of_untouched(checkpoint: Checkpoint, known: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of all tensors of a checkpoint, hashing only those neither known nor cached."""
    files = {entry.file for entry in checkpoint.entries.values()}
    cached = {file: cached_digests(file) for file in files}
    available = {
        name: digest
        for name, entry in checkpoint.entries.items()
        if (digest := known.get(name) or cached[entry.file].get(name)) is not None
    }
    hashed = checkpoint.digests(set(checkpoint.entries) - set(available))
    for file in files:
        remember_digests(file, {name: hashed[name] for name in hashed if checkpoint.entries[name].file == file})
    return available | hashed


def _stat(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
