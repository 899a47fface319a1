"""Search by words: BM25, by the library bm25s."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDER = "bm25"
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")


@dataclass(frozen=True)
class Ranked:
    """A text by its number, and its score; a higher one is better."""

    number: int
    score: float


def best(scores: NDArray[Any], count: int) -> list[Ranked]:
    """Return the highest scores, best first, the lower number first among equals."""
    import numpy as np

    candidates = np.arange(len(scores))
    if count < len(scores):
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        candidates = np.flatnonzero(scores >= least)
    order = candidates[np.lexsort((candidates, -scores[candidates]))][:count]
    return [Ranked(int(number), float(scores[number])) for number in order]


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case; where words are not separated by spaces, each character is one."""
    return _WORD.findall(text.lower())


def require_bm25() -> Any:
    """Return the module bm25s; raises `UserError` if it is not installed."""
    try:
        import bm25s
    except ImportError:
        raise UserError("search by words needs the package bm25s; install `expertctl[retrieval]`") from None
    return bm25s


class Words:
    """A BM25 index."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def of(cls, texts: Iterable[str]) -> Words:
        """Index texts in memory; raises `UserError` if there is no word in them."""
        bm25s = require_bm25()
        vocabulary: dict[str, int] = {}
        ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in words_of(text)] for text in texts]
        if not vocabulary:
            raise UserError("the text has no words; there is nothing to search")
        index = bm25s.BM25()
        index.index((ids, vocabulary), show_progress=False)
        return cls(index)

    @classmethod
    def open(cls, folder: Path) -> Words:
        """Open the index of a folder, whose arrays stay on disk."""
        return cls(require_bm25().BM25.load(folder / FOLDER, mmap=True, show_progress=False, verbosity=0))

    def save(self, folder: Path) -> None:
        """Write the index to a subfolder of a folder."""
        self._index.save(folder / FOLDER, show_progress=False)

    def search(self, queries: Sequence[str], count: int) -> list[list[Ranked]]:
        """Return the best passages of each query, best first; those that share no word with it are left out."""
        return [self._search(query, count) for query in queries]

    def _search(self, query: str, count: int) -> list[Ranked]:
        known = self._index.get_tokens_ids(words_of(query))
        if not known:
            return []
        return [ranked for ranked in best(self._index.get_scores_from_ids(known), count) if ranked.score > 0]
