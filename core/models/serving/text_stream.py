"""Text of tokens as they arrive, and stop texts in it.

Each new token decodes a window of the latest tokens only, so that the cost of a token does not grow with the text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decode = Callable[[list[int]], str]
_CONTEXT = 6
"""Tokens of the prompt that are decoded with the first new ones: some tokenizers drop a space at the begin of a text."""
_INCOMPLETE = "�"
_LONGEST_CHARACTER = 4
"""Most tokens of a character, one per byte of UTF-8; more of them are no text."""


class TextStream:
    """Turns the tokens of one continuation into text."""

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt[-_CONTEXT:])
        """Tokens whose text is known, then those whose text is not."""
        self._num_known = len(self._window)
        self._known_text = decode(self._window)

    def push(self, token: int) -> str:
        """Return the text that a token completes; empty inside a character of several tokens."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_INCOMPLETE) and len(self._window) - self._num_known < _LONGEST_CHARACTER:
            return ""
        return self._accept(text)

    def finish(self) -> str:
        """Return the text of tokens that no further one completes."""
        return self._accept(self._decode(self._window)) if len(self._window) > self._num_known else ""

    def _accept(self, text: str) -> str:
        new = text[len(self._known_text) :]
        self._window = self._window[self._num_known :]
        self._num_known = len(self._window)
        self._known_text = self._decode(self._window)
        return new


class StopFinder:
    """Passes text on until it contains a stop text; holds back what may be the begin of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return the text that is certain to come before any stop text."""
        if not self._stops:
            return text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            before, self._held = self._held[: min(places)], ""
            return before
        kept = max(_overlap(self._held, stop) for stop in self._stops)
        split = len(self._held) - kept
        before, self._held = self._held[:split], self._held[split:]
        return before

    def finish(self) -> str:
        """Return the text that was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that a stop text begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def decoder_of(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Return a function that decodes tokens without special ones, with a tokenizer of its own, since they are not thread-safe."""
    own = copy.deepcopy(tokenizer)
    if own.is_fast:  # without transformers' wrapper, which takes ten times as long
        backend: Any = own.backend_tokenizer
        return lambda ids: str(backend.decode(ids, skip_special_tokens=True))
    return lambda ids: str(own.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
