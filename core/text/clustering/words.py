"""The words of many texts at once, as numbers: what scikit-learn's word pattern finds, some twenty times as fast.

A word is a run of two letters, digits or underscores and more, in lower case. Texts are taken as arrays of code points, so
that finding and hashing words is a few passes of numpy; 64 bits of hash stand for a word.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Analyser = Literal["words", "characters"]
"""`characters`: runs of two and three letters within words, for languages that do not put spaces between them."""
NUMBER = "#NUMBER"
"""What every word stands for that begins with a digit."""
FEWEST_LETTERS = 2
_MULTIPLIER = 0x9E3779B97F4A7C15
_NGRAMS = (2, 3)


@dataclass(frozen=True)
class Words:
    """The words of some texts, in their order."""

    hashes: NDArray[np.uint64]
    texts: NDArray[np.int64]
    """Number of the text that each is of."""
    begins: NDArray[np.int64]
    """Where each begins in `joined`."""
    ends: NDArray[np.int64]
    joined: str

    def spelling(self, number: int) -> str:
        """Return a word as it is written, in lower case."""
        return self.joined[self.begins[number] : self.ends[number]]


def words_of(texts: Sequence[str], analyser: Analyser = "words") -> Words:
    """Return the words of texts, or their runs of letters."""
    import numpy as np

    lowered = [text.lower() for text in texts]
    joined = "\n".join(lowered)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4")
    limits = np.cumsum([0, *(len(text) + 1 for text in lowered)])
    begins, ends = _runs(_is_word_letter()[codes])
    if analyser == "words":
        long = ends - begins >= FEWEST_LETTERS
        begins, ends = begins[long], ends[long]
        hashes = _hashes(codes, begins, ends)
        numbers = _is_digit()[codes[begins]] if begins.size else np.zeros(0, bool)
        hashes[numbers] = hash_of(NUMBER)
    else:
        begins, ends = _pieces(begins, ends)
        hashes = _hashes(codes, begins, ends)
    owners = np.searchsorted(limits, begins, side="right") - 1
    return Words(hashes, owners, begins, ends, joined)


def hash_of(word: str) -> np.uint64:
    """Return the hash of one word, which is taken as it is written here."""
    import numpy as np

    codes = np.frombuffer(word.encode("utf-32-le", "surrogatepass"), "<u4")
    found: np.uint64 = _hashes(codes, np.array([0]), np.array([codes.size]))[0]
    return found


def words_fail(texts: Sequence[str]) -> bool:
    """Tell whether most letters of these texts belong to scripts that put no spaces between words."""
    import numpy as np

    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4")
    letters = codes[_is_word_letter()[codes]]
    unspaced = sum(int(((letters >= low) & (letters <= high)).sum()) for low, high in _UNSPACED)
    return bool(unspaced * 2 > letters.size)


_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Japanese syllables
    (0x3400, 0x9FFF),  # Chinese characters
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def _runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where runs of true begin and end."""
    import numpy as np

    padded = np.zeros(mask.size + 2, np.int8)
    padded[1:-1] = mask
    changes = np.diff(padded)
    return np.flatnonzero(changes == 1), np.flatnonzero(changes == -1)


def _pieces(
    begins: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where all pieces of two and of three letters within the runs begin and end, in order."""
    import numpy as np

    found = []
    for size in _NGRAMS:
        counts = np.maximum(ends - begins - size + 1, 0)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        first = np.repeat(begins, counts) + within
        found.append((first, first + size))
    starts, stops = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(starts, kind="stable")
    return starts[order], stops[order]


def _hashes(
    codes: NDArray[np.uint32], begins: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Return a hash of each stretch of letters: a polynomial in 64 bits, scrambled at the end."""
    import numpy as np

    if not begins.size:
        return np.zeros(0, np.uint64)
    lengths = ends - begins
    firsts = np.cumsum(lengths) - lengths
    places = np.arange(int(lengths.sum())) - np.repeat(firsts, lengths)
    letters = codes[np.repeat(begins, lengths) + places].astype(np.uint64) + np.uint64(1)
    powers = _powers()
    sums = np.add.reduceat(letters * powers[places % powers.size], firsts)
    sums ^= lengths.astype(np.uint64)
    sums ^= sums >> np.uint64(33)
    sums *= np.uint64(0xFF51AFD7ED558CCD)
    sums ^= sums >> np.uint64(33)
    return sums


@functools.cache
def _powers() -> NDArray[np.uint64]:
    import numpy as np

    found, value = np.empty(256, np.uint64), 1
    for place in range(found.size):
        found[place] = value
        value = value * _MULTIPLIER & 0xFFFFFFFFFFFFFFFF
    return found


@functools.cache
def _is_word_letter() -> NDArray[np.bool_]:
    """Return for every code point whether it is a letter, a digit or an underscore."""
    import numpy as np

    found = np.fromiter((chr(code).isalnum() for code in range(0x110000)), bool, 0x110000)
    found[ord("_")] = True
    return found


@functools.cache
def _is_digit() -> NDArray[np.bool_]:
    import numpy as np

    return np.fromiter((chr(code).isdigit() for code in range(0x110000)), bool, 0x110000)
