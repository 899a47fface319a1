"""Requests to an engine of the server, and all that came back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Queue

from expertctl.core.models.serving.engine import Engine
from expertctl.core.models.serving.requests import Job, NewToken, Progress, TextRequest


@dataclass(frozen=True)
class Answer:
    """Everything reported for a request."""

    text: str
    tokens: tuple[NewToken, ...]
    finish: str | None
    error: str | None
    reports: int

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


class Collector:
    """A job and its reports."""

    def __init__(self, request: TextRequest, *, streams: bool = False, client: str = "", seconds: float | None = None):
        self.reports: Queue[Progress] = Queue()
        deadline = None if seconds is None else time.monotonic() + seconds
        self.job = Job(request, self.reports.put, streams, client, deadline)
        self._parts: list[Progress] = []

    def wait_for_text(self) -> None:
        """Wait for the first report."""
        self._parts.append(self.reports.get(timeout=60))

    def answer(self, timeout: float = 60) -> Answer:
        """Wait for the last report and return them all as one answer."""
        parts = self._parts
        while not parts or parts[-1].finish is None:
            parts.append(self.reports.get(timeout=timeout))
        text = "".join(part.text for part in parts)
        tokens = tuple(token for part in parts for token in part.tokens)
        return Answer(text, tokens, parts[-1].finish, parts[-1].error, len(parts))


def answers(engine: Engine, requests: Sequence[TextRequest], *, streams: bool = False) -> list[Answer]:
    """Submit requests together and wait for all answers."""
    collectors = [Collector(request, streams=streams) for request in requests]
    engine.submit([collector.job for collector in collectors])
    return [collector.answer() for collector in collectors]
