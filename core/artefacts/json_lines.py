"""JSON-lines files: one record per line, appended by any process and read as the file grows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import UserError
from .files import os_errors_as_user_errors, write_text

Record = TypeVar("Record")


class JsonLines(Generic[Record]):
    """A file of JSON objects, one per line, which `parse` turns into records.

    A kill can cut a line short. The next `append` ends it with a line break, and `read` leaves it out. Every line is
    flushed to disk if the file is `durable`; `mode` holds the permissions of a new file.
    """

    def __init__(
        self, path: Path, parse: Callable[[dict[str, Any]], Record], *, durable: bool = True, mode: int = 0o666
    ) -> None:
        self.path, self._parse, self._durable, self._mode = path, parse, durable, mode
        self._forget(0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a line, with the keys in their order.

        Lines of several processes never mix, but only a lock keeps a process from taking a line that another one is
        writing for one cut short.
        """
        line = json.dumps(record).encode() + b"\n"
        with os_errors_as_user_errors(self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, self._mode)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line
                while line:  # a full disk takes a part, and fails at the next write
                    line = line[os.write(descriptor, line) :]
                if self._durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace all lines; readers see either the old or the new file."""
        write_text(self.path, "".join(f"{json.dumps(record)}\n" for record in records))

    def read(self) -> Sequence[Record]:
        """Return all records; empty if there is no file.

        Only what was added since the last call is read, into the same list; a file that was replaced or cut gives a new
        list. The last line waits until it is complete. Raises `UserError` that names the line for any other damage.
        """
        if not self.path.exists():
            self._forget(0)
            return self._records
        with os_errors_as_user_errors(self.path), self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._forget(status.st_ino)
            file.seek(self._offset)
            lines = file.read().splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    content = json.loads(line)
                    if not isinstance(content, dict):
                        raise TypeError
                    self._records.append(self._parse(content))
                except (ValueError, TypeError, KeyError):
                    if number == len(lines):
                        break
                    if line.rstrip().endswith(b"}"):  # otherwise cut short
                        raise UserError(
                            f"{self.path}:{self._lines + 1} is damaged; restore the file from a copy"
                        ) from None
            self._offset += len(line)
            self._lines += line.endswith(b"\n")
        return self._records

    def _forget(self, inode: int) -> None:
        """Start reading at the first line; another inode means that the file was replaced."""
        self._inode, self._offset, self._lines = inode, 0, 0
        self._records: list[Record] = []
