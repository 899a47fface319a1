"""Texts on disk that can be read in any order: what is sorted need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self, overload

from ...core.artefacts.files import readable_os_errors


class SpooledTexts(Sequence[str]):
    """The texts of an iterable, in a file without a name that is gone when it is closed. Eight bytes of memory a text."""

    def __init__(self, texts: Iterable[str], folder: Path) -> None:
        """Write them into `folder`; raises `UserError` where its disk is full."""
        from array import array

        self._ends = array("q", [0])
        with readable_os_errors(folder):
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
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        self._file.seek(self._ends[place])
        return self._file.read(self._ends[place + 1] - self._ends[place]).decode("utf-8", "surrogatepass")
