"""The point of a text that grows by tokens: each step costs what is new, and gives what the whole text would.

A text's point is the sum of its words' vectors, brought to length 1 (`clusterer.py`). Words that are over are summed up; letters at
the end, which may become a longer word, are kept as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .clusterer import Clusterer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream


@dataclass(frozen=True)
class TextSoFar:
    """What has to be known of a text to let it grow; never changes."""

    sums: NDArray[np.float32]
    """(d,), of the words that are over."""
    tail: str
    """Letters at the end."""
    stream: DecodeStream
    """Knows how the next token is spelled, and tokens that are no whole letter yet."""


@dataclass(frozen=True)
class Reader:
    """Spells tokens, and knows words."""

    clusterer: Clusterer
    tokenizer: Tokenizer
    separator: int
    """Id of the token between documents; no word goes on behind it."""

    def begin(self) -> TextSoFar:
        """Return the empty text."""
        import numpy as np
        from tokenizers.decoders import DecodeStream

        return TextSoFar(np.zeros(self.clusterer.vectors.shape[1], np.float32), "", DecodeStream())

    def grow(self, text: TextSoFar, pieces: Sequence[Sequence[int]]) -> tuple[TextSoFar, NDArray[np.float32]]:
        """Let a text grow by pieces of tokens, one after the other.

        Returns the grown text, and the sum of all its words after each piece, (pieces, d).
        """
        if not pieces:
            return text, text.sums[None][:0]
        stream, tail = copy.copy(text.stream), text.tail
        parts = []
        for piece in pieces:
            letters = tail + self._spelled(stream, piece)
            end = _end_of_words(letters)
            tail = letters[end:]
            parts += [letters[:end], tail]
        sums = self.clusterer.sums(parts)
        settled = text.sums + sums[::2].cumsum(axis=0)
        return TextSoFar(settled[-1], tail, stream), settled + sums[1::2]

    def _spelled(self, stream: DecodeStream, tokens: Sequence[int]) -> str:
        pieces = (
            "\n" if token == self.separator else stream.step(self.tokenizer, token) or "" for token in tokens
        )
        return "".join(pieces)


def _end_of_words(letters: str) -> int:
    """Return where the last run of letters begins, which may go on."""
    end = len(letters)
    while end and (letters[end - 1].isalnum() or letters[end - 1] == "_"):
        end -= 1
    return end
