"""A federation without a network: requests go out and deliveries come back as folders, or as one `.tar` file each."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ...core.artefacts.files import (
    link_or_copy,
    new_folder,
    read_json,
    readable_os_errors,
    refuse_existing,
    write_json,
)
from ...core.errors import UserError
from .coordinator.coordinator import Coordinator
from .judging.acceptance import Refusal
from .protocol.delivery import Signed
from .protocol.parts import read_part
from .protocol.requests import ExpertRequest

REQUEST_FILE = "request.json"
SEED_FOLDER = "seed"
TAR = ".tar"


def write_pack(
    coordinator: Coordinator,
    request: ExpertRequest,
    target: Path,
    *,
    with_seed: bool = True,
    force: bool = False,
) -> None:
    """Write a request, with the seed unless the owner has it, as a folder or a `.tar` file."""
    refuse_existing(target, force=force, what="pack")
    with _folder_for(target, force=force) as folder:
        write_json(folder / REQUEST_FILE, request.as_json())
        if with_seed:
            (folder / SEED_FOLDER).mkdir()
            seed = coordinator.seed_folder(request)
            for file in request.seed_files:
                link_or_copy(seed / file.name, folder / SEED_FOLDER / file.name)


@contextmanager
def opened(path: Path, state: Path) -> Iterator[Path]:
    """Give a pack or a delivery as a folder; a `.tar` file is unpacked beside the owner's or coordinator's state meanwhile.

    Raises `UserError` for what is neither, and for an archive with anything but plain files and folders below it.
    """
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with TemporaryDirectory(prefix=".unpacked-", dir=state) as folder:
        try:
            with readable_os_errors(path), tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not (member.isreg() or member.isdir()):
                        raise UserError(
                            f"{path} holds '{member.name:.80}', which is no plain file; it is not opened"
                        )
                    archive.extract(member, folder, filter="data")
        except tarfile.TarError as error:
            raise UserError(f"{path} is no archive that can be opened ({error}); fetch it again") from None
        yield Path(folder)


def read_request(folder: Path) -> ExpertRequest:
    """Read the request of a pack."""
    path = folder / REQUEST_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no pack: it has no {REQUEST_FILE}; `expertctl federate pack` makes one")
    return ExpertRequest.of_json(read_json(path))


def write_delivery(folder: Path, target: Path, *, force: bool = False) -> None:
    """Hand a signed delivery on as a folder or a `.tar` file."""
    refuse_existing(target, force=force, what="delivery")
    with _folder_for(target, force=force) as copy:
        for path in sorted(folder.iterdir()):
            link_or_copy(path, copy / path.name)


def hand_in(coordinator: Coordinator, folder: Path) -> tuple[ExpertRequest, Refusal | None]:
    """Take a delivery in from a folder, with the same checks as over a network; return its request, and why it is refused."""
    signed = Signed.read(folder)
    statement = signed.statement
    request = coordinator.request(statement.request)
    wanted = coordinator.begin(request.owner, request.id, signed)
    if isinstance(wanted, Refusal):
        return request, wanted
    for file in statement.files:
        for index in wanted[file.name]:
            coordinator.put(
                request.owner, request.id, file.name, index, read_part(folder / file.name, file, index)
            )
    return request, coordinator.finish(request.owner, request.id)


@contextmanager
def _folder_for(target: Path, *, force: bool) -> Iterator[Path]:
    """Give a folder to fill that becomes the target: itself, or the content of the `.tar` file that the target is."""
    if target.suffix != TAR:
        with new_folder(target, force=force, what="folder") as folder:
            yield folder
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".packing-", dir=target.parent) as scratch:
        content = Path(scratch) / "content"
        content.mkdir()
        yield content
        partial = Path(scratch) / target.name
        with readable_os_errors(target):
            with tarfile.open(partial, "w") as archive:
                for path in sorted(content.rglob("*")):
                    archive.add(
                        path.resolve(),
                        path.relative_to(content).as_posix(),
                        recursive=False,
                        filter=_anonymous,
                    )
            partial.replace(target)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out who packed it and when; links become what they lead to."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = 0
    return member
