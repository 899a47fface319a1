"""Pushing an artefact, or another folder, to a remote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..artefacts.digests import CARD_FILE, artefact_files
from ..errors import UserError
from ..remote.hub import commit_to_hub
from ..remote.transfers import Transfer
from ..remote.upload import Uploaded, upload
from ..remote.urls import HUB, is_url, open_remote
from .manifest import Manifest, manifest_path
from .verification import require_intact


def push(
    folder: Path,
    url: str,
    *,
    card: Callable[[Manifest], str],
    private: bool = False,
    revision: str | None = None,
    force: bool = False,
    transfer: Transfer | None = None,
) -> Uploaded:
    """Push an intact artefact to a URL of fsspec or a repository of the hub, as the folder that it is, without logs.

    A folder without a manifest is pushed file by file too. `card` writes the model card for the hub if the artefact has
    none; `private` and `revision` (a branch) are for the hub. Raises `UserError` if the artefact differs from its
    manifest, if something else is at the URL, and without permission.
    """
    transfer = transfer or Transfer()
    if not is_url(url):
        raise UserError(f"{url!r:.200} is no URL; push to s3://, gs://, file:// and other protocols, or hub:owner/name")
    path = manifest_path(folder)
    manifest = require_intact(folder) if path is not None else None
    names = [file.relative_to(folder).as_posix() for file in artefact_files(folder)]
    if not names:
        raise UserError(f"{folder} has no files to push")
    names += [path.name] if path is not None else []
    if url.startswith(HUB):
        has_card = CARD_FILE in names or manifest is None
        cards = {} if has_card or manifest is None else {CARD_FILE: card(manifest)}
        return commit_to_hub(
            url, folder, names, cards, private=private, revision=revision, force=force, transfer=transfer
        )
    if private or revision is not None:
        raise UserError("--private and --revision are for repositories of the hub; push to hub:owner/name")
    with open_remote(url) as remote:
        if remote.scheme in ("file", "local") and Path(remote.root).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{remote.url} is in the folder that is to be pushed; choose another URL")
        return upload(remote, folder, names, transfer, force=force)
