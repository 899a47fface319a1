"""The user's cache of downloaded files by sha256, `$XDG_CACHE_HOME/expertctl/files`.

Files are hard links to the downloaded ones where both are on one file system, so that the cache takes space only for files
that were removed elsewhere. Artefacts never depend on it: what is taken from it is a link or a copy.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..artefacts.files import cache_folder, exclusive, os_errors_as_user_errors, partial_sibling
from ..errors import UserError

MAX_CACHE_BYTES = 20 << 30
"""Size of the cache; the files that were added or linked first are removed first."""


def take(sha256: str, size: int, target: Path) -> bool:
    """Put a cached file at `target` and return whether there is one; its content is not checked."""
    cached = cache_folder("files") / sha256
    try:
        if cached.stat().st_size != size:
            return False
    except OSError:
        return False
    link_or_duplicate(cached, target)
    return True


def keep(path: Path, sha256: str) -> None:
    """Add a file to the cache; does nothing if it is larger than the cache or the cache cannot be written."""
    folder = cache_folder("files")
    size = path.stat().st_size
    if size > MAX_CACHE_BYTES or (folder / sha256).exists():
        return
    partial = partial_sibling(folder / sha256)
    try:
        with exclusive(cache_folder("locks") / "files.lock", "the cache of downloaded files"):
            folder.mkdir(parents=True, exist_ok=True)
            _make_room(folder, MAX_CACHE_BYTES - size)
            link_or_duplicate(path, partial)
            partial.replace(folder / sha256)
    except (OSError, UserError):  # a cache only saves time
        partial.unlink(missing_ok=True)


def forget(sha256: str) -> None:
    """Remove a file from the cache."""
    (cache_folder("files") / sha256).unlink(missing_ok=True)


def link_or_duplicate(source: Path, target: Path) -> None:
    """Make `target` a hard link to a file, or a copy where that is not possible; never a symbolic link."""
    source = source.resolve()
    with os_errors_as_user_errors(target):
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


def _make_room(folder: Path, limit: int) -> None:
    """Remove the oldest files until the rest has at most `limit` bytes; a new link renews a file's change time."""
    files = sorted(((path.stat(), path) for path in folder.iterdir()), key=lambda entry: entry[0].st_ctime_ns)
    total = sum(status.st_size for status, _ in files)
    for status, path in files:
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= status.st_size
