"""Answers of OpenAI's API, whole and in chunks, with each expert's share of each token as a field of our own."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from expertctl.core.models.serving.requests import FinishReason, NewToken, Progress

from .models import ServedModel

Kind = Literal["completion", "chat"]
_OBJECTS = {
    "completion": ("text_completion", "text_completion", "cmpl"),
    "chat": ("chat.completion", "chat.completion.chunk", "chatcmpl"),
}


@dataclass
class _Choice:
    """A text as it grows."""

    text: str = ""
    tokens: list[NewToken] = field(default_factory=list)
    finish: FinishReason | None = None
    num_characters: int = 0
    """Length of the text that was sent in chunks."""


class Answer:
    """Collects the texts of a request and gives the bodies of its answer."""

    def __init__(
        self, model: ServedModel, kind: Kind, count: int, prompt_tokens: int, *, logprobs: bool, shares: bool
    ) -> None:
        self._model, self._kind = model, kind
        self._logprobs, self._shares = logprobs, shares
        self._prompt_tokens = prompt_tokens
        self._choices = [_Choice() for _ in range(count)]
        self._whole, self._chunk, prefix = _OBJECTS[kind]
        self._id, self._created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        self._num_tokens = 0

    def add(self, index: int, progress: Progress) -> None:
        """Add the progress of a text, for `whole`."""
        choice = self._choices[index]
        choice.text += progress.text
        choice.tokens += progress.tokens
        choice.finish = progress.finish
        self._num_tokens += len(progress.tokens)

    def whole(self) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        choices = []
        for index, choice in enumerate(self._choices):
            text: dict[str, Any] = {"text": choice.text}
            if self._kind == "chat":
                text = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
            choices.append(self._content(index, text, choice.tokens, choice.finish, 0))
        return {**self._head(self._whole), "choices": choices, "usage": self.usage()}

    def first_chunks(self) -> list[dict[str, Any]]:
        """Return the chunks before any text: of a chat, the role of each message."""
        if self._kind != "chat":
            return []
        return [
            self._chunk_of(self._content(index, {"delta": {"role": "assistant", "content": ""}}, (), None, 0))
            for index in range(len(self._choices))
        ]

    def chunk(self, index: int, progress: Progress) -> dict[str, Any]:
        """Return the chunk for the progress of a text."""
        choice = self._choices[index]
        self._num_tokens += len(progress.tokens)
        text: dict[str, Any] = {"text": progress.text}
        if self._kind == "chat":
            text = {"delta": {"content": progress.text} if progress.text or progress.tokens else {}}
        content = self._content(index, text, progress.tokens, progress.finish, choice.num_characters)
        choice.num_characters += sum(len(token.text) for token in progress.tokens)
        return self._chunk_of(content)

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk, with the numbers of tokens."""
        return {**self._head(self._chunk), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": self._prompt_tokens + self._num_tokens,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}

    def _chunk_of(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(self._chunk), "choices": [choice]}

    def _content(
        self,
        index: int,
        text: Mapping[str, Any],
        tokens: Sequence[NewToken],
        finish: FinishReason | None,
        offset: int,
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"index": index, **text, "logprobs": None, "finish_reason": finish}
        if self._logprobs and tokens:
            as_logprobs = self._chat_logprobs if self._kind == "chat" else self._completion_logprobs
            content["logprobs"] = as_logprobs(tokens, offset)
        if self._shares and tokens:
            content["expert_shares"] = [
                {
                    "token": token.text,
                    "shares": {name: round(share, 6) for name, share in (token.shares or {}).items()},
                }
                for token in tokens
            ]
        return content

    def _completion_logprobs(self, tokens: Sequence[NewToken], offset: int) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [self._model.token_text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._by_text(token.alternatives) for token in tokens],
            "text_offset": offsets,
        }

    def _by_text(self, alternatives: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Return log-probabilities by text; of tokens with the same text, such as parts of characters, the largest."""
        by_text: dict[str, float] = {}
        for token, logprob in alternatives:
            by_text.setdefault(self._model.token_text(token), logprob)
        return by_text

    def _chat_logprobs(self, tokens: Sequence[NewToken], offset: int) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._chat_token(token.id, token.logprob),
                    "top_logprobs": [self._chat_token(number, logprob) for number, logprob in token.alternatives],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _chat_token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._model.token_text(token)
        # a part of a character is no text, so its bytes are not known from it
        return {"token": text, "logprob": logprob, "bytes": None if "�" in text else list(text.encode("utf-8"))}
