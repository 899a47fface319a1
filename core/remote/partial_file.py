"""A file that arrives in parts, in any order and across interruptions."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock

from ..artefacts.digests import sha256_of_file
from ..artefacts.files import os_errors_as_user_errors
from ..artefacts.safetensors_io import write_at


class PartialFile:
    """Writes the parts of one file at their offsets, and marks which have arrived; may be used by several threads."""

    def __init__(self, path: Path, size: int, part_bytes: int) -> None:
        self.path, self.size, self.part_bytes = path, size, part_bytes
        self._content = _content(path)
        self._marks = path.with_name(f".{path.name}.marks")
        self._lock = Lock()
        marks = self._marks.read_bytes() if self._marks.is_file() and self._content.is_file() else b""
        count = -(-size // part_bytes)
        self._missing = {index for index in range(count) if marks[index : index + 1] != b"\x01"}

    @staticmethod
    def written_bytes(path: Path) -> int:
        """Return what an unfinished file takes on the disk; it may have holes."""
        content = _content(path)
        return content.stat().st_blocks * 512 if content.is_file() else 0

    def missing(self) -> list[int]:
        """Return the indices of the parts that have not arrived, sorted."""
        return sorted(self._missing)

    def span(self, index: int) -> tuple[int, int]:
        """Return the bytes [begin, end) of a part."""
        return index * self.part_bytes, min((index + 1) * self.part_bytes, self.size)

    def put(self, index: int, content: bytes) -> bool:
        """Write a part to the disk and return whether it was the last one."""
        with os_errors_as_user_errors(self.path):
            _write_durably(self._content, index * self.part_bytes, content)
            with self._lock:
                _write_durably(self._marks, index, b"\x01")  # after the part itself is on disk
                self._missing.discard(index)
                return not self._missing

    def finish(self) -> str:
        """Move the complete file into place and return its sha256."""
        assert not self._missing, f"{len(self._missing)} parts of {self.path.name} are missing"
        with os_errors_as_user_errors(self.path):
            if not self.size:
                self._content.touch()
            digest = sha256_of_file(self._content)
            self._content.replace(self.path)
            self._marks.unlink(missing_ok=True)
        return digest

    def discard(self) -> None:
        """Remove the file and what has arrived of it."""
        for path in (self.path, self._content, self._marks):
            path.unlink(missing_ok=True)


def _content(path: Path) -> Path:
    return path.with_name(f".{path.name}.parts")


def _write_durably(path: Path, offset: int, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        write_at(descriptor, memoryview(content), offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
