"""Chunked file transfer: each part of a file has a digest, can be sent on its own, and is written at its final offset.

Neither side holds more than one part in memory. The content is opaque bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import FailFast, Field

from ....core.artefacts.files import inside, os_errors_as_user_errors
from ....core.artefacts.safetensors_io import write_at
from ....core.errors import UserError
from .fields import Digest, FileName, Message

PART_BYTES = 64 << 20
"""Largest part, and the default size."""
READ_BYTES = 1 << 20
MAX_PARTS = 1 << 16
"""Most parts of a file, 4 TiB of parts of the default size."""


@dataclass(frozen=True)
class FileParts(Message):
    """A file's name, size and digests, as a whole and by part."""

    LABEL = "a file entry"

    name: FileName
    size: Annotated[int, Field(ge=0, le=MAX_PARTS * PART_BYTES)]
    """Bytes."""
    sha256: Digest
    """Digest of the whole file."""
    parts: Annotated[tuple[Digest, ...], Field(max_length=MAX_PARTS), FailFast()]
    """sha256 of each part, in order."""
    part_size: Annotated[int, Field(ge=1, le=PART_BYTES)] = PART_BYTES
    """Bytes of every part but the last."""

    def __post_init__(self) -> None:
        if not is_file_name(self.name):  # also where an own file's parts are computed
            raise UserError(
                f"{self.name!r:.100} cannot be sent: names of files have letters, digits, '-', '_' and '.', and do not "
                "begin with a dot"
            )
        if len(self.parts) != -(-self.size // self.part_size):
            raise UserError(f"{self.name} of {self.size:,} bytes cannot have {len(self.parts)} parts")

    def span(self, index: int) -> tuple[int, int]:
        """Return the byte range [begin, end) of a part; raises `UserError` for an index out of range."""
        if not 0 <= index < len(self.parts):
            raise UserError(f"{self.name} has {len(self.parts)} parts; there is no part {index}")
        return index * self.part_size, min((index + 1) * self.part_size, self.size)


def is_file_name(text: str) -> bool:
    """Return whether a text is a `FileName`."""
    return re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", text) is not None


def is_digest(text: object) -> bool:
    """Return whether a text is a sha256 in hexadecimal."""
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def parts_of(path: Path, part_size: int = PART_BYTES) -> FileParts:
    """Compute the digests of a file and its parts, reading it once."""
    file_digest, digests = hashlib.sha256(), []
    size = 0
    with os_errors_as_user_errors(path), path.open("rb") as file:
        while True:
            part_digest, left = hashlib.sha256(), part_size
            while left and (piece := file.read(min(READ_BYTES, left))):
                part_digest.update(piece)
                file_digest.update(piece)
                left -= len(piece)
            if left == part_size:
                break
            size += part_size - left
            digests.append(part_digest.hexdigest())
    return FileParts(path.name, size, file_digest.hexdigest(), tuple(digests), part_size)


def read_part(path: Path, file: FileParts, index: int) -> bytes:
    """Read one part of a file; raises `UserError` if the file has become shorter."""
    begin, end = file.span(index)
    with os_errors_as_user_errors(path), path.open("rb") as stream:
        stream.seek(begin)
        data = stream.read(end - begin)
    if len(data) != end - begin:
        raise UserError(f"{path} is shorter than expected; create it again")
    return data


class PartsWriter:
    """Writes the parts of one file, in any order and across restarts."""

    def __init__(self, folder: Path, file: FileParts) -> None:
        self.file, self.path = file, inside(folder, file.name)
        self._partial = folder / f".{file.name}.parts"
        self._marks = folder / f".{file.name}.marks"

    def missing(self) -> list[int]:
        """Return the indices of the parts that have not arrived; empty once the file is complete."""
        if self.path.is_file():
            return []
        marks = self._marks.read_bytes() if self._marks.is_file() else b""
        return [index for index in range(len(self.file.parts)) if marks[index : index + 1] != b"\x01"]

    def put(self, index: int, data: bytes) -> None:
        """Write one part; raises `UserError` for bytes that do not match the announced digest and for a full disk."""
        begin, end = self.file.span(index)
        if len(data) != end - begin or hashlib.sha256(data).hexdigest() != self.file.parts[index]:
            raise UserError(f"part {index} of {self.file.name} does not match its announced digest; send it again")
        if index not in self.missing():
            return
        with os_errors_as_user_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write_durably(self._partial, begin, data)
            _write_durably(self._marks, index, b"\x01")  # after the part itself is on disk

    def finish(self) -> Path:
        """Check the whole file and move it into place; raises `UserError` for missing parts or another digest."""
        if self.path.is_file():
            return self.path
        missing = self.missing()
        if missing:
            raise UserError(f"{len(missing)} of {len(self.file.parts)} parts of {self.file.name} are missing")
        with os_errors_as_user_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.file.parts:
                self._partial.touch()
            with self._partial.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != self.file.sha256:
                self._partial.unlink()
                self._marks.unlink(missing_ok=True)
                raise UserError(f"{self.file.name} does not match its announced digest; send it again")
            self._partial.rename(self.path)
            self._marks.unlink(missing_ok=True)
        return self.path


def _write_durably(path: Path, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        write_at(descriptor, memoryview(data), offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
