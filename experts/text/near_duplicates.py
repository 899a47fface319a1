"""Near-duplicate removal by shared shingles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b

SHINGLE_WORDS = 8


def drop_near_duplicates(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the (key, text) pairs whose texts are not near-duplicates of earlier texts, in order.

    A text is dropped if more than half of its distinct shingles (runs of 8 whitespace-separated words) occur in texts
    kept before. A text of fewer than 8 words is a single shingle, so only an exact repetition is dropped. Of two
    near-duplicates the first is kept.

    Streams; memory grows by about 70 bytes per distinct shingle kept.
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
    # not hash(), which Python salts differently in every process
    return int.from_bytes(blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest())
