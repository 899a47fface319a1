"""Incremental embedding of a text that grows token by token; each step costs only the new tokens.

A text's embedding is the normalised sum of its words' vectors (`clusterer.py`). Complete words are summed; trailing
letters, which may become part of a longer word, are buffered.
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
class GrowingText:
    """Immutable state of a growing text."""

    sums: NDArray[np.float32]
    """Sum of the vectors of all complete words, (d,)."""
    tail: str
    """Trailing letters that may continue a word."""
    stream: DecodeStream
    """Incremental decoder, which buffers tokens of an incomplete character."""


@dataclass(frozen=True)
class Reader:
    """Decodes tokens and sums the vectors of their words."""

    clusterer: Clusterer
    tokenizer: Tokenizer
    separator: int
    """Id of the token between documents, which ends a word."""

    def begin(self) -> GrowingText:
        """Return the empty text."""
        import numpy as np
        from tokenizers.decoders import DecodeStream

        return GrowingText(np.zeros(self.clusterer.vectors.shape[1], np.float32), "", DecodeStream())

    def grow(self, text: GrowingText, pieces: Sequence[Sequence[int]]) -> tuple[GrowingText, NDArray[np.float32]]:
        """Append token pieces; return the new text and the sum of its words' vectors after each piece, (pieces, d)."""
        if not pieces:
            return text, text.sums[None][:0]
        stream, tail = copy.copy(text.stream), text.tail
        parts = []
        for piece in pieces:
            letters = tail + self._decode(stream, piece)
            end = _end_of_complete_words(letters)
            tail = letters[end:]
            parts += [letters[:end], tail]
        sums = self.clusterer.sums(parts)
        complete = text.sums + sums[::2].cumsum(axis=0)
        return GrowingText(complete[-1], tail, stream), complete + sums[1::2]

    def _decode(self, stream: DecodeStream, tokens: Sequence[int]) -> str:
        pieces = ("\n" if token == self.separator else stream.step(self.tokenizer, token) or "" for token in tokens)
        return "".join(pieces)


def _end_of_complete_words(letters: str) -> int:
    """Return the start of the trailing run of letters, which may be an incomplete word."""
    end = len(letters)
    while end and (letters[end - 1].isalnum() or letters[end - 1] == "_"):
        end -= 1
    return end
