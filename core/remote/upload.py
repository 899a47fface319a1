"""Uploading a folder: what an earlier attempt has uploaded stays, and the file that marks it as complete comes last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from ..artefacts.digests import MANIFEST_NAMES, sha256_of_file
from ..errors import UserError
from .index import INDEX_FILE, DamagedIndexError, Index, RemoteFile, local_path, read_index
from .transfers import Count, Transfer, run_all
from .urls import MissingFile, Remote

MAX_MANIFEST_BYTES = 256 << 20
STORES = ("s3", "s3a", "gs", "gcs")
"""Protocols whose file systems upload in parts and repeat those that fail; others send a file again."""
UPLOAD_PART = 8 << 20
"""Bytes of a part, the smallest common size that S3 (5 MiB) and Google (a multiple of 256 KiB) take."""


@dataclass(frozen=True)
class Uploaded:
    """What an upload did."""

    files: int
    """Files of the folder."""
    sent: int
    """Files that were not at the remote yet."""
    bytes: int
    """Bytes of the files that were sent."""


def upload(remote: Remote, folder: Path, names: Sequence[str], transfer: Transfer, *, force: bool = False) -> Uploaded:
    """Upload the files `names` of a folder, of which the last one marks the folder as complete, after an index.

    The files of an unfinished upload are sent only if they are missing or differ; one that was interrupted during a file
    sends that file again. `force` replaces a complete folder. Raises `UserError` if there is one with other content, or
    files that were not uploaded by this function.
    """
    if remote.scheme in ("http", "https"):
        raise UserError(
            f"{remote.url}: plain HTTP servers take no uploads; push to s3://, gs://, hub: or another protocol"
        )
    local = {name: RemoteFile((folder / name).stat().st_size, sha256_of_file(folder / name)) for name in names}
    for name in names:
        local_path(folder, name)
    there = _old_index(remote, force=force)
    manifests = [name for name in MANIFEST_NAMES.values() if remote.info(name) is not None]
    finished = there.complete if there is not None else bool(manifests)
    if there is not None and finished and dict(there.files) == local and all(remote.info(name) for name in names[-1:]):
        return Uploaded(len(names), 0, 0)
    _refuse_others(remote, there, finished=finished, force=force)
    old = dict(there.files) if there is not None else _files_of_manifests(remote, manifests)
    for name in manifests:
        remote.remove(name)
    return _Upload(remote, folder, local, transfer).run(old, names[-1], again=finished)


def _files_of_manifests(remote: Remote, manifests: Sequence[str]) -> dict[str, RemoteFile | None]:
    """Return the files of an artefact without an index, as far as its manifest can be read."""
    names: set[str] = set()
    for manifest in manifests:
        try:
            found = list(json.loads(remote.read_whole(manifest, MAX_MANIFEST_BYTES))["files"])
            names |= {name for name in found if local_path(Path(), name)}
        except (ValueError, TypeError, KeyError, AttributeError, UserError):
            continue
    return dict.fromkeys(names)


def _old_index(remote: Remote, *, force: bool) -> Index | None:
    try:
        return read_index(remote)
    except DamagedIndexError:
        if not force:
            raise
        return None


def _refuse_others(remote: Remote, there: Index | None, *, finished: bool, force: bool) -> None:
    if force:
        return
    if finished:
        raise UserError(f"{remote.url} exists already; use --force to replace it, or choose another URL")
    try:
        if there is None and remote.call("ls", remote.root, detail=False):
            raise UserError(f"{remote.url} holds other files; choose another URL, or use --force to write beside them")
    except MissingFile:
        return


class _Upload:
    """One upload: the files that are at the remote, and the index that lists them."""

    def __init__(self, remote: Remote, folder: Path, local: dict[str, RemoteFile], transfer: Transfer) -> None:
        self._remote, self._folder, self._local, self._transfer = remote, folder, local, transfer
        self._there: dict[str, RemoteFile] = {}
        self._lock = Lock()

    def run(self, old: Mapping[str, RemoteFile | None], last: str, *, again: bool) -> Uploaded:
        """Send what is missing, remove what is not wanted any more, and write index and last file.

        `old` are the files of the last push; with `again`, they are all sent again.
        """
        if not again:
            self._there = {name: self._local[name] for name in old if name != last and self._is_there(name, old[name])}
        missing = sorted(
            self._local.keys() - self._there.keys() - {last}, key=lambda name: (-self._local[name].size, name)
        )
        self._remote.make_parent(INDEX_FILE)
        self._write_index(complete=False)
        count = Count(self._transfer.reporter, "uploading", sum(self._local[name].size for name in (*missing, last)))

        def send(name: str) -> None:
            self._send(name)
            with self._lock:
                self._there[name] = self._local[name]
                if self._local[name].size >= self._transfer.part_bytes:  # stores limit how often one object is written
                    self._write_index(complete=False)
            count.add(self._local[name].size)

        run_all(self._transfer.jobs, send, missing, self._remote.stop)
        for name in sorted(old.keys() - self._local.keys()):
            self._remote.remove(name)
        self._there[last] = self._local[last]
        self._write_index(complete=True)
        self._send(last)
        count.add(self._local[last].size)
        return Uploaded(len(self._local), len(missing) + 1, count.done)

    def _is_there(self, name: str, file: RemoteFile | None) -> bool:
        if file is None or self._local.get(name) != file:
            return False
        info = self._remote.info(name)
        return info is not None and info.get("size") == file.size

    def _send(self, name: str) -> None:
        size = self._local[name].size
        self._remote.make_parent(name)
        parts = {"chunksize": UPLOAD_PART} if self._remote.scheme in STORES else {}
        self._remote.call(
            "put_file", str(self._folder / name), self._remote.path(name), what=name, num_bytes=size, **parts
        )
        info = self._remote.info(name)
        if info is None or info.get("size") not in (None, size):
            raise UserError(f"{self._remote.url}/{name} was not stored in full; run the same command again")

    def _write_index(self, *, complete: bool) -> None:
        content = Index(self._there, complete).text().encode()
        self._remote.call("pipe_file", self._remote.path(INDEX_FILE), content, what=INDEX_FILE, num_bytes=len(content))
