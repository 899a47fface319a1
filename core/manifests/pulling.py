"""Pulling an artefact, or another pushed folder, from a remote."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..artefacts.digests import MANIFEST_NAMES
from ..artefacts.files import exclusive, exclusive_output, refuse_existing, resumable_folder
from ..artefacts.layout import Layout, check_name, require_free
from ..errors import UserError
from ..remote.download import SOURCE_FILE, download
from ..remote.file_cache import link_or_duplicate
from ..remote.hub import exactly, hub_snapshot
from ..remote.index import Index, RemoteFile, local_path, read_index
from ..remote.listing import named_files
from ..remote.transfers import Transfer
from ..remote.upload import MAX_MANIFEST_BYTES
from ..remote.urls import HUB, MissingFile, Remote, is_url, open_remote, without_secrets
from .manifest import Manifest, manifest_path, read_manifest
from .renaming import write_under_name
from .verification import require_intact

_UNFINISHED = "was not pushed to the end; run the same `expertctl push` again"


@dataclass(frozen=True)
class Pulled:
    """A pulled folder."""

    folder: Path
    manifest: Manifest | None
    """None for a folder that is no artefact."""


@dataclass(frozen=True)
class _Source:
    """A complete remote folder: its manifest, and how its other files get into a local folder."""

    manifest: Manifest | None
    manifest_content: bytes
    fetch: Callable[[Path], object]


def pull(
    url: str,
    layout: Layout | None,
    name: str | None = None,
    *,
    card: Callable[[Manifest], str],
    output: Path | None = None,
    force: bool = False,
    transfer: Transfer | None = None,
) -> Pulled:
    """Pull an artefact into its place in a workspace, or any pushed folder into `output`.

    `name` is the artefact's new name in the workspace; `card` then writes its model card. The folder appears when every
    byte was checked against the manifest; an interrupted pull is resumed. Raises `UserError` for a remote that is
    unfinished, damaged or hostile, and if the folder exists, unless `force`.
    """
    transfer = transfer or Transfer()
    if not is_url(url):
        raise UserError(
            f"{url!r:.200} is no URL; pull from s3://, gs://, https:// and other protocols, or hub:owner/name"
        )
    with _opened(url, transfer) as source, ExitStack() as locks:
        manifest = source.manifest
        if output is not None:
            folder = output
            locks.enter_context(exclusive_output(output, f"the folder {output}"))
        elif layout is None:
            raise UserError("there is no workspace here; name a folder with --output, or a workspace with --workspace")
        elif manifest is None:
            raise UserError(f"{without_secrets(url)} is no artefact; name a folder for it with --output")
        else:
            folder = _place(layout, manifest, name)
            for kind in ("run", "generalist"):
                locks.enter_context(exclusive(layout.lock(f"{kind}-{folder.name}"), f"'{folder.name}'", patience_s=0.5))
        refuse_existing(folder, force=force)
        with resumable_folder(folder, force=force, resume=True) as partial:
            source.fetch(partial)
            if manifest is not None:
                (partial / MANIFEST_NAMES[manifest.kind]).write_bytes(source.manifest_content)
                require_intact(partial, manifest=manifest)
            (partial / SOURCE_FILE).unlink(missing_ok=True)
            if manifest is not None and name not in (None, manifest.name):
                manifest = write_under_name(partial, manifest, str(name), card)
        return Pulled(folder, manifest)


def _place(layout: Layout, manifest: Manifest, name: str | None) -> Path:
    """Return the folder of a pulled artefact in a workspace."""
    if manifest.kind == "seed":
        if name not in (None, "seed"):
            raise UserError("every workspace has its seed under this name; leave NAME out, or use --output")
        return layout.seed
    name = check_name(name or manifest.name, f"a {manifest.kind}")
    folder = (layout.experts if manifest.kind == "expert" else layout.generalists) / name
    require_free(layout, name, folder)
    return folder


@contextmanager
def _opened(url: str, transfer: Transfer) -> Iterator[_Source]:
    if url.startswith(HUB):
        yield _on_hub(url, transfer)
        return
    with open_remote(url) as remote:
        yield _at_remote(remote, transfer)


def _on_hub(url: str, transfer: Transfer) -> _Source:
    """Return the source for a repository of the hub, at the commit that its revision names now."""
    first = hub_snapshot(url, transfer, MANIFEST_NAMES.values())
    if manifest_path(first) is None:
        raise UserError(f"{url} has no manifest of expertctl; to import a model, use `expertctl seed --from {url}`")
    manifest = _parsed(first, url)
    commit = f"{url.partition('@')[0]}@{first.name}"

    def fetch(folder: Path) -> None:
        snapshot = hub_snapshot(commit, transfer, exactly(manifest.files))
        for name in manifest.files:
            source, target = local_path(snapshot, name), local_path(folder, name)
            if not source.is_file():
                raise UserError(f"{url} lacks {name!a:.80}; push the artefact again")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            link_or_duplicate(source, target)

    return _Source(manifest, (first / MANIFEST_NAMES[manifest.kind]).read_bytes(), fetch)


def _at_remote(remote: Remote, transfer: Transfer) -> _Source:
    """Return the source for a folder with an index, or with only a manifest if other tools have copied it."""
    index = read_index(remote)
    if index is not None and not index.complete:
        raise UserError(f"{remote.url} {_UNFINISHED}")
    manifest, content = None, b""
    for name in MANIFEST_NAMES.values():
        entry = index.files.get(name) if index is not None else None
        if (index is None or entry is not None) and (found := _read_manifest(remote, name, entry)) is not None:
            manifest, content = found
    files = _files(remote, index, manifest)
    return _Source(manifest, content, lambda folder: download(remote, files, folder, transfer))


def _files(remote: Remote, index: Index | None, manifest: Manifest | None) -> Mapping[str, RemoteFile]:
    """Return the files of a remote folder but its manifest."""
    if index is None:
        if manifest is None:
            raise UserError(f"{remote.url} has no manifest and no index: it is no artefact, or {_UNFINISHED}")
        for name in manifest.files:
            local_path(Path(), name)
        return named_files(remote, manifest.files)
    files = {name: file for name, file in index.files.items() if name not in MANIFEST_NAMES.values()}
    if manifest is not None and files.keys() != manifest.files.keys():
        name = min(files.keys() ^ manifest.files.keys())
        raise UserError(f"{remote.url}: index and manifest do not agree on {name!a:.80}; push the artefact again")
    return files


def _read_manifest(remote: Remote, name: str, entry: RemoteFile | None) -> tuple[Manifest, bytes] | None:
    """Return a remote manifest and its bytes, None if it does not exist; `entry` is that of the index, if there is one."""
    try:
        content = remote.read_whole(name, MAX_MANIFEST_BYTES)
    except MissingFile:
        if entry is not None:
            raise UserError(f"{remote.url} {_UNFINISHED} ({name} is missing)") from None
        return None
    if entry is not None and hashlib.sha256(content).hexdigest() != entry.sha256:
        raise UserError(f"{remote.url}/{name} does not have the sha256 that its index states; push it again")
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / name).write_bytes(content)
        return _parsed(Path(scratch), remote.url), content


def _parsed(folder: Path, url: str) -> Manifest:
    """Read the manifest of a remote; errors name its URL."""
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        raise UserError(str(error).replace(str(folder), url)) from None
    if not (folder / MANIFEST_NAMES[manifest.kind]).is_file():
        raise UserError(f"{url}: the manifest of a {manifest.kind} has the name of another kind's; push it again")
    return manifest
