"""Passages: documents in pieces that fit into a context, in a file that is read by number."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PASSAGES, OFFSETS = "passages.jsonl", "offsets.npy"
BOUNDARIES = (re.compile(r"\n\s*\n"), re.compile(r"\n|(?<=[.!?])\s|(?<=[。！？])"), re.compile(r"\s"))
"""Where a passage may end, best first: paragraphs, lines and sentences, words."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document."""

    domain: str
    text: str


def split_text(text: str, characters: int) -> Iterator[str]:
    """Yield the pieces of a text, each of at most `characters`; together they are the text but for white space around them.

    A piece ends at the best boundary in its second half, or in the middle of a word if there is none.
    """
    begin, text = 0, text.strip()
    while len(text) - begin > characters:
        end = _end_of_piece(text, begin, begin + characters)
        if piece := text[begin:end].strip():
            yield piece
        begin = end
    if piece := text[begin:].strip():
        yield piece


def _end_of_piece(text: str, begin: int, limit: int) -> int:
    for boundary in BOUNDARIES:
        ends = [match.end() for match in boundary.finditer(text, (begin + limit) // 2, limit)]
        if ends:
            return ends[-1]
    return limit


def write_passages(folder: Path, passages: Iterable[Passage]) -> None:
    """Write passages to `folder`, one by one."""
    import numpy as np

    offsets = [0]
    with (folder / PASSAGES).open("wb") as file:
        for passage in passages:
            line = json.dumps({"domain": passage.domain, "text": passage.text}, ensure_ascii=False)
            offsets.append(offsets[-1] + file.write(line.encode("utf-8", "surrogatepass") + b"\n"))
    np.save(folder / OFFSETS, np.asarray(offsets, dtype=np.int64))


class Passages:
    """The passages of a folder."""

    def __init__(self, folder: Path) -> None:
        """Open a folder; raises `UserError` if its files do not belong together."""
        import numpy as np

        self._path = folder / PASSAGES
        self._offsets: NDArray[np.int64] = np.load(folder / OFFSETS)
        if self._path.stat().st_size != self._offsets[-1]:
            raise UserError(f"{self._path} is damaged; build the index again")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __iter__(self) -> Iterator[Passage]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Passage:
        if not 0 <= number < len(self):
            raise IndexError(number)
        begin, end = self._offsets[number : number + 2].tolist()
        with self._path.open("rb") as file:
            file.seek(begin)
            content = json.loads(file.read(end - begin).decode("utf-8", "surrogatepass"))
        return Passage(content["domain"], content["text"])
