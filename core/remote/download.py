"""Downloading the files of a remote in parts, into a folder that keeps what has arrived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ..artefacts.digests import sha256_of_file
from ..artefacts.files import os_errors_as_user_errors, read_json, remove_tree, require_space, write_json
from ..errors import UserError
from . import file_cache
from .index import RemoteFile, local_path
from .partial_file import PartialFile
from .transfers import Count, Transfer, run_all
from .urls import Remote

SOURCE_FILE = ".source.json"
"""Record of an unfinished download: URL and files."""


def download(
    remote: Remote,
    files: Mapping[str, RemoteFile],
    target: Path,
    transfer: Transfer,
    *,
    folder: str = "",
    file_name: str = "",
) -> dict[str, str]:
    """Download files into `target / folder` and return their sha256; what an earlier attempt left is not requested again.

    A remote that is a file itself has the empty name, and is stored as `file_name`. Files with a known sha256 come from
    the user's cache if they are there. The caller removes `SOURCE_FILE` from the complete folder. Raises `UserError` that
    names the file if its size or content is not as announced.
    """
    paths = {name: local_path(target / folder, name or file_name) for name in files}
    _drop_others(remote, files, paths, target, transfer.part_bytes)
    digests: dict[str, str] = {}
    pending: list[str] = []
    for name, file in files.items():
        path = paths[name]
        with os_errors_as_user_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() and not _from_cache(file, path):
            pending.append(name)
        else:
            digests[name] = sha256_of_file(path)
    run_all(transfer.jobs, lambda name: _check_size(remote, name, files[name]), pending, remote.stop)
    unwritten = sum(files[name].size - PartialFile.written_bytes(paths[name]) for name in pending)
    require_space(target, unwritten)  # before the parts are counted, which a hostile size would make very many
    partials = {name: PartialFile(paths[name], files[name].size, transfer.part_bytes) for name in pending}

    parts = [(name, index) for name, partial in partials.items() for index in partial.missing()]
    lengths = (end - begin for name, index in parts for begin, end in [partials[name].span(index)])
    count = Count(transfer.reporter, "downloading", sum(lengths))

    def fetch(part: tuple[str, int]) -> None:
        name, index = part
        begin, end = partials[name].span(index)
        content = remote.read(name, begin, end)
        if len(content) != end - begin:
            raise UserError(
                f"{remote.url}/{name} sent {len(content):,} bytes when asked for {end - begin:,}: the file is shorter or "
                "longer than announced, or the server does not support ranged reads; push it again, or use another server"
            )
        if partials[name].put(index, content):
            finish(name)
        count.add(len(content))

    def finish(name: str) -> None:
        digests[name] = partials[name].finish()
        announced = files[name].sha256
        if announced is None:
            return
        if digests[name] != announced:
            partials[name].discard()
            raise UserError(f"{remote.url}/{name} does not have the sha256 that its index states; push it again")
        file_cache.keep(partials[name].path, announced)

    for name, partial in partials.items():
        if not partial.missing():
            finish(name)
    run_all(transfer.jobs, fetch, parts, remote.stop)
    return {name: digests[name] for name in files}


def unfinished_source(folder: Path) -> str | None:
    """Return the URL from which an unfinished folder is downloaded; None for any other folder."""
    return str(read_json(folder / SOURCE_FILE).get("url")) if (folder / SOURCE_FILE).is_file() else None


def _from_cache(file: RemoteFile, path: Path) -> bool:
    """Put a file in place from the user's cache if it is there, with the right content."""
    if file.sha256 is None or not file_cache.take(file.sha256, file.size, path):
        return False
    if sha256_of_file(path) == file.sha256:
        return True
    path.unlink()
    file_cache.forget(file.sha256)
    return False


def _check_size(remote: Remote, name: str, file: RemoteFile) -> None:
    info = remote.info(name)
    if info is None:
        raise UserError(f"{remote.url}/{name} is missing; push the artefact again")
    size = info.get("size")
    if size is not None and size != file.size:
        raise UserError(f"{remote.url}/{name} has {size:,} bytes where {file.size:,} are announced; push it again")


def _drop_others(
    remote: Remote, files: Mapping[str, RemoteFile], paths: Mapping[str, Path], target: Path, part_bytes: int
) -> None:
    """Remove what an earlier attempt left, unless it downloaded the same version of the same files."""
    described = {name: asdict(file) for name, file in files.items()}
    old = read_json(target / SOURCE_FILE) if (target / SOURCE_FILE).is_file() else {}
    if (old.get("url"), old.get("part_bytes"), old.get("files", {}).keys()) != (remote.url, part_bytes, files.keys()):
        for path in target.iterdir():
            remove_tree(path)
    else:
        for name in files:
            if old["files"][name] != described[name]:
                PartialFile(paths[name], 0, part_bytes).discard()
    write_json(target / SOURCE_FILE, {"url": remote.url, "part_bytes": part_bytes, "files": described})
