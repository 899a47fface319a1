"""Repositories on the Hugging Face hub: downloading snapshots into its cache, and commits of whole folders."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

from ..artefacts.digests import CARD_FILE, MANIFEST_NAMES
from ..artefacts.hub_cache import is_hub_name, split_revision
from ..errors import UserError, first_line
from ..reporting import Reporter
from .hub_access import hub_allowed
from .retries import is_refusal, persistently
from .transfers import Count, Transfer, run_all
from .upload import Uploaded
from .urls import HUB, LOG_IN, without_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Result = TypeVar("Result")

_ATTEMPTS = 2
"""Attempts of an operation on the hub, whose library repeats the requests in it five times itself."""


def hub_snapshot(reference: str, transfer: Transfer, names: Iterable[str] | None = None) -> Path:
    """Download files of a repository (default: all) into the Hugging Face cache and return the folder of the commit.

    `reference` is `hub:owner/name` or `hub:owner/name@revision`; `names` may be shell-style patterns. Interrupted
    downloads resume. Raises `UserError` without access, and if there is no such repository or revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = _parsed(reference)

    def fetch() -> str:
        try:
            return snapshot_download(
                name,
                revision=revision,
                allow_patterns=None if names is None else list(names),
                max_workers=transfer.jobs,
                tqdm_class=_bar(transfer.reporter),
            )
        except LocalEntryNotFoundError as error:  # what it raises without a connection
            raise ConnectionError(first_line(error)) from None

    with hub_allowed():
        return Path(_call(reference, fetch))


def exactly(names: Iterable[str]) -> list[str]:
    """Return the patterns that match some names and no others."""
    return [glob.escape(name) for name in names]


def commit_to_hub(
    reference: str,
    folder: Path,
    names: Sequence[str],
    texts: Mapping[str, str],
    *,
    private: bool,
    revision: str | None,
    force: bool,
    transfer: Transfer,
) -> Uploaded:
    """Commit files of a folder, and texts by file name, to a repository of the hub, which is created if necessary.

    The commit is made when every file is uploaded; files of an interrupted upload are not sent again. Raises `UserError`
    if the repository has other files, unless `force`, which removes them from the branch.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    repository, own_revision = _parsed(reference)
    branch = revision or own_revision
    additions = [CommitOperationAdd(name, str(folder / name)) for name in names]
    additions += [CommitOperationAdd(name, text.encode("utf-8")) for name, text in texts.items()]
    sizes = {addition.path_in_repo: addition.upload_info.size for addition in additions}

    with hub_allowed():
        api = HfApi()
        _call(reference, lambda: api.create_repo(repository, private=private or None, exist_ok=True))
        if private and not _call(reference, lambda: api.model_info(repository)).private:
            raise UserError(
                f"{reference} exists already and is public; make it private on its page, or leave out --private"
            )
        if branch is not None:
            _call(reference, lambda: api.create_branch(repository, branch=branch, exist_ok=True))
        there = _call(reference, lambda: api.list_repo_files(repository, revision=branch))
        stale = {name for name in there if not name.startswith(".")} - sizes.keys() - {CARD_FILE}
        manifests = [name for name in MANIFEST_NAMES.values() if name in there]
        if manifests == [names[-1]] and not stale and _has_same(api, repository, branch, folder, names[-1]):
            return Uploaded(len(names), 0, 0)
        if (manifests or stale) and not force:
            raise UserError(
                f"{reference} holds other files already; use --force to replace them, or choose another name"
            )
        count = Count(transfer.reporter, "uploading", sum(sizes.values()))

        def preupload(addition: CommitOperationAdd) -> None:
            try:
                api.preupload_lfs_files(repository, [addition], revision=branch, free_memory=False)
            except RuntimeError as error:  # which hides what the transport or the hub said
                raise error.__cause__ or error from None

        def send(addition: CommitOperationAdd) -> None:
            _call(reference, lambda: preupload(addition))
            count.add(sizes[addition.path_in_repo])

        run_all(transfer.jobs, send, additions, Event())
        operations: list[Any] = [*additions, *(CommitOperationDelete(name) for name in sorted(stale))]
        _call(
            reference,
            lambda: api.create_commit(
                repository, operations, commit_message=f"Push {folder.name}", revision=branch, num_threads=transfer.jobs
            ),
        )
    return Uploaded(len(names), len(additions), count.done)


def _has_same(api: HfApi, repository: str, branch: str | None, folder: Path, name: str) -> bool:
    """Return whether a file in a repository is that of a folder."""
    path = _call(HUB + repository, lambda: api.hf_hub_download(repository, name, revision=branch))
    return Path(path).read_bytes() == (folder / name).read_bytes()


def _parsed(reference: str) -> tuple[str, str | None]:
    name, revision = split_revision(reference.removeprefix(HUB))
    if not is_hub_name(name):
        raise UserError(
            f"{reference!r:.200} is no repository of the hub; write hub:owner/name or hub:owner/name@revision"
        )
    return name, revision


def _call(reference: str, action: Callable[[], Result]) -> Result:
    """Return the result of a request to the hub, repeated if the connection drops; its failure is a `UserError`."""
    try:
        return persistently(action, _ATTEMPTS)
    except UserError:
        raise
    except Exception as error:  # of the hub's library and the transports below it
        raise UserError(_sentence(reference, error)) from ConnectionError(without_secrets(first_line(error)))


def _sentence(reference: str, error: Exception) -> str:
    """Return what a failed request means and what to do, without secrets."""
    from huggingface_hub import errors

    reason = without_secrets(f"{type(error).__name__}: {first_line(error)}")[:200]
    if isinstance(error, errors.GatedRepoError):
        return f"{reference} is gated: accept its terms on its page, then {LOG_IN['hf']}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{reference}: the repository has no such revision; give a branch, a tag or a commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{reference} does not exist, or is private and you are not logged in; check the name, or {LOG_IN['hf']}"
    if is_refusal(error):
        return (
            f"{reference}: access is denied ({reason}); your token may have expired or may not allow this: {LOG_IN['hf']} "
            "to a token with the permission"
        )
    return f"{reference}: the hub cannot be reached ({reason}); check the connection, then run the same command again"


def _bar(reporter: Reporter) -> Any:
    """Return a class for the hub's progress bars that reports downloaded bytes instead of drawing."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.bytes_done = 0
            self.is_shown = options.get("unit") == "B" and not str(options.get("desc", "")).startswith("Downloading")
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self.bytes_done += int(n or 0)
            if self.is_shown and self.total:
                reporter.progress("downloading", min(self.bytes_done, int(self.total)), int(self.total), "bytes")

    return Bar
