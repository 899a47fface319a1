"""Requests to generate text, and what comes back for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TextRequest:
    """A prompt to be continued, and how."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_tokens: int = 16
    temperature: float = 1.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Sample only from the most probable tokens up to this cumulative probability."""
    top_k: int = 0
    """Sample only from this many most probable tokens; 0: from all."""
    seed: int = 0
    """The same request with the same seed has the same continuation, whatever else runs."""
    stop: tuple[str, ...] = ()
    """Texts that end the continuation, which does not contain them."""
    logprobs: int | None = None
    """Number of alternatives whose log-probabilities are returned for each token, 0 for the token's alone."""
    shares: bool = False
    """Whether to return each expert's share of each token (ensembles)."""
    ignore_eos: bool = False
    """Continue after an end-of-sequence token."""


@dataclass(frozen=True)
class NewToken:
    """A generated token."""

    id: int
    text: str
    """The text that it completes; for a character of several tokens, empty for all but the last."""
    logprob: float | None = None
    """Natural logarithm of its probability, before temperature and truncation; None if not requested."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The most probable tokens instead of it, with their log-probabilities."""
    shares: Mapping[str, float] | None = None
    """Responsibility of each expert for the token, summing to 1."""


@dataclass(frozen=True)
class Progress:
    """New text of a request; with a finish reason, the last one."""

    text: str
    """Text since the previous progress; it may lag behind the tokens where a stop text may have begun."""
    tokens: tuple[NewToken, ...]
    finish: FinishReason | None = None
    error: str | None = None
    """Why the request failed; its `finish` is `cancelled`."""


Listener = Callable[[Progress], None]


@dataclass(eq=False)
class Job:
    """A request in the queue or in a batch; `listener` is called from the engine's thread."""

    request: TextRequest
    listener: Listener
    streams: bool = False
    """Whether to report every token; otherwise once, at the end."""
    client: str = ""
    """Who sent it: clients take turns."""
    deadline: float | None = None
    """Time on the monotonic clock at which the continuation ends as it is."""
    cancelled: Event = field(default_factory=Event)

    def cancel(self) -> None:
        """Give up the request: it leaves the batch before the next token."""
        self.cancelled.set()
