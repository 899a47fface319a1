"""Random access to texts in a temporary file, for texts that do not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self, overload

from ...core.artefacts.files import os_errors_as_user_errors


class SpooledTexts(Sequence[str]):
    """A sequence of texts in an anonymous temporary file; takes eight bytes of memory per text."""

    def __init__(self, texts: Iterable[str], folder: Path) -> None:
        """Write the texts to a file in `folder`; raises `UserError` if the disk is full."""
        from array import array

        self._ends = array("q", [0])
        with os_errors_as_user_errors(folder):
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115  # closed by `__exit__`
            for text in texts:
                self._file.write(text.encode("utf-8", "surrogatepass"))
                self._ends.append(self._file.tell())
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        self._file.seek(self._ends[index])
        return self._file.read(self._ends[index + 1] - self._ends[index]).decode("utf-8", "surrogatepass")
