"""Offline federation: packs carry requests to owners and deliveries come back, as folders or `.tar` files."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from ...core.artefacts.files import (
    inside,
    new_folder,
    os_errors_as_user_errors,
    read_json,
    refuse_existing,
    require_regular,
    write_json,
)
from ...core.errors import UserError
from .coordinator.coordinator import Coordinator
from .judging.refusal import Refusal
from .protocol.delivery import SignedStatement
from .protocol.parts import read_part
from .protocol.requests import ExpertRequest

REQUEST_FILE = "request.json"
SEED_FOLDER = "seed"
TAR = ".tar"
MAX_MEMBERS = 2000
"""Most files of an archive."""
MAX_DEPTH = 4
"""Most folders within each other in an archive."""
MAX_REQUEST = 4 << 20
"""Largest `request.json`, in bytes."""


def write_pack(
    coordinator: Coordinator, request: ExpertRequest, target: Path, *, with_seed: bool = True, force: bool = False
) -> None:
    """Write a pack: a request, with the seed unless `with_seed` is false, as a folder or a `.tar` file."""
    with _folder_for(target, "pack", force=force) as folder:
        write_json(folder / REQUEST_FILE, request.as_json())
        if with_seed:
            (folder / SEED_FOLDER).mkdir()
            seed = coordinator.seed_folder(request)
            for file in request.seed_files:
                shutil.copyfile(seed / file.name, folder / SEED_FOLDER / file.name)


@contextmanager
def open_pack(path: Path, state: Path) -> Iterator[Path]:
    """Yield a pack or a delivery as a folder; a `.tar` file is unpacked into a temporary folder in `state`.

    Raises `UserError` if the path does not exist, and for an archive with anything but regular files and folders, or whose
    files are larger than the archive: sparse files could fill a disk from a few bytes.
    """
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with TemporaryDirectory(prefix=".unpacked-", dir=state) as folder:
        try:
            with os_errors_as_user_errors(path), require_regular(path).open("rb") as file:
                _require_plain_files(path, file)
                with tarfile.open(fileobj=file, mode="r:") as archive:
                    for member in archive:
                        archive.extract(member, folder, filter="data")
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise UserError(f"{path} is not a readable archive ({error}); copy it again") from None
        yield Path(folder)


def _require_plain_files(path: Path, file: BinaryIO) -> None:
    """Raise `UserError` unless an archive holds plain files and folders with plain names only, and no more than its size.

    Extended headers, links, devices and sparse files are not read: `tarfile` reads the first into memory whole.
    """
    size, position = path.stat().st_size, 0
    for _ in range(MAX_MEMBERS + 1):
        file.seek(position)
        header = file.read(tarfile.BLOCKSIZE)
        if len(header) < tarfile.BLOCKSIZE or not any(header):  # the end
            file.seek(0)
            return
        member = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
        name = member.name
        position += (1 + -(-member.size // tarfile.BLOCKSIZE)) * tarfile.BLOCKSIZE
        is_plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
        if not is_plain or member.size < 0 or position > size or name.count("/") > MAX_DEPTH:
            break
    file.seek(0)
    raise UserError(
        f"{path} contains '{name:.80}', which is not a plain file of an archive of at most "
        f"{MAX_MEMBERS} files; it is not unpacked"
    )


def read_request(folder: Path) -> ExpertRequest:
    """Read the request of a pack; raises `UserError` if there is none."""
    path = folder / REQUEST_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a pack: it has no {REQUEST_FILE}; make one with `expertctl federate pack`")
    if require_regular(path).stat().st_size > MAX_REQUEST:
        raise UserError(f"{path} is larger than {MAX_REQUEST:,} bytes; it is refused")
    return ExpertRequest.of_json(read_json(path))


def write_delivery(folder: Path, target: Path, *, force: bool = False) -> None:
    """Write a signed delivery as a folder or a `.tar` file."""
    with _folder_for(target, "delivery", force=force) as copy:
        for path in sorted(folder.iterdir()):
            shutil.copyfile(path, copy / path.name)  # a link across devices would be symbolic, which nobody follows


def receive_delivery(coordinator: Coordinator, folder: Path) -> tuple[ExpertRequest, Refusal | None]:
    """Receive a delivery from a folder with the checks of the network path; return its request and the refusal or None."""
    signed = SignedStatement.read(folder)
    request = coordinator.files.request(signed.statement.request)
    missing = coordinator.begin(request, signed)
    if isinstance(missing, Refusal):
        return request, missing
    for file in signed.statement.files:
        for index in missing[file.name]:
            part = read_part(require_regular(inside(folder, file.name)), file, index)
            coordinator.files.put(request.id, file.name, index, part)
    return request, coordinator.finish(request)


@contextmanager
def _folder_for(target: Path, what: str, *, force: bool) -> Iterator[Path]:
    """Yield a folder to fill, which becomes the target or the content of the target's `.tar` file."""
    refuse_existing(target, force=force, what=what)
    if target.suffix != TAR:
        with new_folder(target, force=force, what=what) as folder:
            yield folder
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".packing-", dir=target.parent) as scratch:
        content = Path(scratch) / "content"
        content.mkdir()
        yield content
        partial = Path(scratch) / target.name
        with os_errors_as_user_errors(target):
            with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as archive:
                for path in sorted(content.rglob("*")):
                    archive.add(
                        path.resolve(), path.relative_to(content).as_posix(), recursive=False, filter=_anonymise
                    )
            partial.replace(target)


def _anonymise(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Clear the user, group and modification time of an archive member."""
    return member.replace(uid=0, gid=0, uname="", gname="", mtime=0, deep=False)
