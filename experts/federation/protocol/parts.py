"""Large files in parts: each has a digest, can be sent alone and again, and lies at its place when it has arrived.

Neither end ever holds more than one part; dtypes do not matter, bytes are bytes.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....core.artefacts.files import readable_os_errors
from ....core.errors import UserError

PART_BYTES = 64 << 20
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class FileParts:
    """One file as its parts."""

    name: str
    """Without a folder."""
    size: int
    sha256: str
    """Of the whole file."""
    parts: tuple[str, ...]
    """sha256 of each part, in order."""
    part_size: int = PART_BYTES

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name or self.name.startswith("."):
            raise UserError(f"{self.name!r} is no name of a file that is handed on")
        digests = [self.sha256, *self.parts]
        if self.size < 0 or self.part_size < 1 or not all(is_digest(digest) for digest in digests):
            raise UserError(f"what is said of the parts of {self.name} makes no sense")
        if len(self.parts) != -(-self.size // self.part_size):
            raise UserError(f"{self.name} of {self.size:,} bytes cannot have {len(self.parts)} parts")

    def span(self, index: int) -> tuple[int, int]:
        """Return where a part begins and ends; raises `UserError` for one that there is not."""
        if not 0 <= index < len(self.parts):
            raise UserError(f"{self.name} has {len(self.parts)} parts, and no part {index}")
        return index * self.part_size, min((index + 1) * self.part_size, self.size)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size": self.size,
            "sha256": self.sha256,
            "parts": list(self.parts),
            "part_size": self.part_size,
        }

    @classmethod
    def of_json(cls, content: Any) -> FileParts:
        """Read what `as_json` gives; raises `UserError` for anything else."""
        try:
            found = cls(
                content["name"],
                content["size"],
                content["sha256"],
                tuple(content["parts"]),
                content["part_size"],
            )
        except (KeyError, TypeError, ValueError):
            raise UserError("what is said of a file's parts makes no sense") from None
        return found


def is_digest(text: object) -> bool:
    """Tell whether a text is a sha256 in hexadecimal."""
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def parts_of(path: Path, part_size: int = PART_BYTES) -> FileParts:
    """Return a file's parts; it is read once."""
    whole, digests = hashlib.sha256(), []
    size = 0
    with readable_os_errors(path), path.open("rb") as file:
        while True:
            part, left = hashlib.sha256(), part_size
            while left and (piece := file.read(min(READ_BYTES, left))):
                part.update(piece)
                whole.update(piece)
                left -= len(piece)
            if left == part_size:
                break
            size += part_size - left
            digests.append(part.hexdigest())
    return FileParts(path.name, size, whole.hexdigest(), tuple(digests), part_size)


def read_part(path: Path, file: FileParts, index: int) -> bytes:
    """Return one part of a file; raises `UserError` where the file is shorter than it was."""
    begin, end = file.span(index)
    with readable_os_errors(path), path.open("rb") as stream:
        stream.seek(begin)
        data = stream.read(end - begin)
    if len(data) != end - begin:
        raise UserError(f"{path} is shorter than it was; make it again")
    return data


class PartsWriter:
    """Gathers the parts of one file, in any order, over any number of tries and processes."""

    def __init__(self, folder: Path, file: FileParts) -> None:
        self.file, self.path = file, folder / file.name
        self._partial = folder / f".{file.name}.parts"
        self._marks = folder / f".{file.name}.marks"

    def missing(self) -> list[int]:
        """Return the parts that have not arrived; none once the file stands."""
        if self.path.is_file():
            return []
        marks = self._marks.read_bytes() if self._marks.is_file() else b""
        return [index for index in range(len(self.file.parts)) if marks[index : index + 1] != b"\x01"]

    def put(self, index: int, data: bytes) -> None:
        """Take one part in; raises `UserError` for bytes that are not what was announced, and for a full disk."""
        begin, end = self.file.span(index)
        if len(data) != end - begin or hashlib.sha256(data).hexdigest() != self.file.parts[index]:
            raise UserError(f"part {index} of {self.file.name} is not what was announced; send it again")
        if index not in self.missing():
            return
        with readable_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _write_at(self._partial, begin, data)
            _write_at(self._marks, index, b"\x01")  # only when the part itself is on the disk

    def finish(self) -> Path:
        """Return the file, complete and checked as a whole; raises `UserError` for parts that are missing."""
        if self.path.is_file():
            return self.path
        missing = self.missing()
        if missing:
            raise UserError(f"{len(missing)} of {len(self.file.parts)} parts of {self.file.name} are missing")
        with readable_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.file.parts:
                self._partial.touch()
            with self._partial.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest()
            if whole != self.file.sha256:
                self._partial.unlink()
                self._marks.unlink(missing_ok=True)
                raise UserError(f"{self.file.name} is not what was announced; send it again")
            self._partial.rename(self.path)
            self._marks.unlink(missing_ok=True)
        return self.path


def _write_at(path: Path, place: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, place)
            view, place = view[written:], place + written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
