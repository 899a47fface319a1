"""Dropping documents that mostly repeat earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b

SHINGLE_WORDS = 8


def drop_near_duplicates(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the (key, text) pairs that are new, in order.

    A document goes when more than half of its distinct shingles (runs of 8 words, words being what white
    space separates) stand in documents already kept. One of fewer than 8 words is a single shingle, so it
    goes only when the very same words came before. Which of two alike stays depends on the order alone.

    Streams; memory grows by some 70 bytes for each distinct shingle that was kept.
    """
    kept: set[int] = set()
    for key, text in documents:
        shingles = _shingles(text)
        if 2 * len(shingles & kept) <= len(shingles):
            kept |= shingles
            yield key, text


def _shingles(text: str) -> set[int]:
    words = text.split()
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return {_stable_hash(" ".join(words[start : start + SHINGLE_WORDS])) for start in starts}


def _stable_hash(words: str) -> int:
    # not hash(): Python salts that anew in every process
    return int.from_bytes(blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest())
