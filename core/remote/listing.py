"""The files of a remote: from its index, or as its file system lists them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import UserError
from .index import MAX_FILES, RemoteFile
from .urls import Remote

_CHANGES_BY_ITSELF = ("url", "atime", "time")
"""Entries of `info` that differ between requests for the same file: signed addresses, times of access."""


def listed_files(remote: Remote, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, RemoteFile]:
    """Return the visible files below a remote folder; a file itself has the empty name.

    Raises `UserError` if there are none. Servers of plain HTTP list no folders.
    """
    info = remote.info()
    if info is not None:
        return {"": _described(remote, "", info)}
    paths: Mapping[str, Any] = remote.call("find", remote.root, detail=True)
    prefix = remote.path("x")[:-1]
    infos = {path.removeprefix(prefix): info for path, info in sorted(paths.items()) if path.startswith(prefix)}
    visible = {name for name in infos if not any(part.startswith(".") for part in name.split("/")) and wanted(name)}
    if not visible:
        raise UserError(
            f"{remote.url} does not exist, has no usable files, or is on a server that lists no folders; check the URL"
        )
    if len(visible) > MAX_FILES:
        raise UserError(f"{remote.url} has more than {MAX_FILES:,} files; give a folder inside it")
    return {name: _described(remote, name, infos[name]) for name in sorted(visible)}


def named_files(remote: Remote, names: Iterable[str]) -> dict[str, RemoteFile]:
    """Return size and version of some files of a remote folder; raises `UserError` for one that is missing."""
    files = {}
    for name in names:
        info = remote.info(name)
        if info is None:
            raise UserError(f"{remote.url}/{name} is missing; push the artefact again")
        files[name] = _described(remote, name, info)
    return files


def _described(remote: Remote, name: str, info: Mapping[str, Any]) -> RemoteFile:
    if not isinstance(info.get("size"), int):
        raise UserError(f"{remote.url}/{name}: the server does not tell the size of the file; use another one")
    kept = {key: value for key, value in info.items() if key not in _CHANGES_BY_ITSELF}
    version = hashlib.sha256(json.dumps(kept, default=str, sort_keys=True).encode()).hexdigest()
    return RemoteFile(info["size"], version=version)
