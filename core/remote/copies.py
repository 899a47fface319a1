"""Copies of remote text and models in a workspace: `.remote/KEY`, with the digests of what was fetched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..artefacts.files import exclusive, read_json, resumable_folder, write_json
from ..errors import UserError
from ..reporting import SILENT, Reporter
from .download import SOURCE_FILE, download
from .index import Index, RemoteFile, read_index
from .listing import listed_files
from .transfers import Transfer
from .urls import HUB, MissingFile, Remote, is_url, open_remote, without_secrets

COPIES_FOLDER = ".remote"
RECORD_FILE = "source.json"
_FILES = "files"


def source_path(root: Path, source: str, reporter: Reporter = SILENT) -> Path:
    """Return the path of a file or folder that a project names: relative to it, or its copy if it is a URL.

    A URL is fetched if there is no copy yet; see `refresh`.
    """
    if not is_url(source):
        return root / Path(source).expanduser()
    return copy_of(root, source) or refresh(root, source, reporter)


def copy_of(root: Path, url: str) -> Path | None:
    """Return the path of a workspace's copy of a remote file or folder, None if there is none; uses no network."""
    folder = _folder(root, url)
    if not (folder / RECORD_FILE).is_file():
        return None
    return folder / _FILES / str(read_json(folder / RECORD_FILE)["path"])


def digests_of_copy(root: Path, url: str) -> dict[str, str]:
    """Return the sha256 of every file of a copy by name, empty if there is none."""
    record = _folder(root, url) / RECORD_FILE
    return {name: file["sha256"] for name, file in read_json(record)["files"].items()} if record.is_file() else {}


def refresh(
    root: Path,
    url: str,
    reporter: Reporter = SILENT,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    jobs: int = 4,
) -> Path:
    """Fetch a remote file or folder into the workspace, unless its copy is current; return the path of the copy.

    A changed remote is fetched again, which is reported. If the remote cannot be reached, an existing copy is used, and that
    is reported too. `wanted` selects files of a folder by name.
    """
    folder = _folder(root, url)
    with exclusive(
        root / ".locks" / f"remote-{folder.name}.lock", f"the copy of {without_secrets(url)}", patience_s=600
    ):
        try:
            return _refreshed(folder, url, Transfer(jobs, reporter=reporter), wanted)
        except UserError as error:
            copy = copy_of(root, url)
            if copy is None or not isinstance(error.__cause__, ConnectionError) or isinstance(error, MissingFile):
                raise
            reporter.say(f"{error}; the copy that was fetched before is used")
            return copy


def _refreshed(folder: Path, url: str, transfer: Transfer, wanted: Callable[[str], bool]) -> Path:
    if url.startswith(HUB):
        raise UserError(f"{url} names a model; write hf://datasets/owner/name/FILE for text on the hub")
    name = without_secrets(url).partition("?")[0].rstrip("/").rpartition("/")[2]
    known: Mapping[str, Any] = read_json(folder / RECORD_FILE) if (folder / RECORD_FILE).is_file() else {}
    with open_remote(url) as remote:
        files = _files(remote, wanted)
        path = name if "" in files else "."
        described = {file_name: asdict(file) for file_name, file in files.items()}
        if known.get("described") == described:
            return folder / _FILES / path
        if known:
            transfer.reporter.say(f"{remote.url} has changed since it was fetched; fetching it again")
        with resumable_folder(folder, force=True, resume=True) as partial:
            digests = download(remote, files, partial, transfer, folder=_FILES, file_name=name)
            if _files(remote, wanted) != files:
                raise UserError(f"{remote.url} changed while it was fetched; run the same command again")
            record = {file_name: {"size": file.size, "sha256": digests[file_name]} for file_name, file in files.items()}
            write_json(
                partial / RECORD_FILE, {"url": remote.url, "path": path, "files": record, "described": described}
            )
            (partial / SOURCE_FILE).unlink()
    return folder / _FILES / path


def _files(remote: Remote, wanted: Callable[[str], bool]) -> dict[str, RemoteFile]:
    """Return the files of a remote: those of its index if it is a pushed folder, else those that are listed."""
    index: Index | None = read_index(remote) if remote.info() is None else None
    if index is None:
        return listed_files(remote, wanted)
    if not index.complete:
        raise UserError(f"{remote.url} was not pushed to the end; run the same `expertctl push` again")
    return {name: file for name, file in index.files.items() if wanted(name)}


def _folder(root: Path, url: str) -> Path:
    return root / COPIES_FOLDER / hashlib.sha256(url.encode()).hexdigest()[:16]
