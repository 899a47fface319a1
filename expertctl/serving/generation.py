"""A request's texts on their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from expertctl.core.models.serving.engine import Engine, QueueFullError, StoppedError
from expertctl.core.models.serving.requests import Job, Listener, Progress, TextRequest

from .errors import RequestError


@dataclass(frozen=True)
class Update:
    """Progress of one of a request's texts."""

    index: int
    progress: Progress


class Generation:
    """The texts of one request: queued together, reported as they grow, given up together."""

    def __init__(self, requests: Sequence[TextRequest], *, streams: bool, client: str, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        deadline = time.monotonic() + seconds
        self._jobs = [
            Job(request, self._listener(index), streams, client, deadline) for index, request in enumerate(requests)
        ]
        self._num_running = len(requests)
        self.num_tokens = 0
        """Tokens generated so far."""

    def start(self, engine: Engine) -> None:
        """Queue the texts; raises `RequestError` if there is no room or the server stops."""
        try:
            engine.submit(self._jobs)
        except QueueFullError:
            raise RequestError(429, "too many requests are waiting; try again later", code="queue_full") from None
        except StoppedError:
            raise RequestError(503, "the server is stopping") from None

    def cancel(self) -> None:
        """Give up all texts; they leave the batch before the next token."""
        for job in self._jobs:
            job.cancel()

    async def updates(self) -> AsyncIterator[list[Update]]:
        """Yield all that is new, until every text is finished; raises `RequestError` if one failed."""
        while self._num_running:
            new = [await self._updates.get()]
            while not self._updates.empty():
                new.append(self._updates.get_nowait())
            for update in new:
                self.num_tokens += len(update.progress.tokens)
                self._num_running -= update.progress.finish is not None
                if update.progress.error is not None:
                    self.cancel()
                    raise _failure(update.progress.error)
            yield new

    def _listener(self, index: int) -> Listener:
        def listen(progress: Progress) -> None:
            self._loop.call_soon_threadsafe(self._updates.put_nowait, Update(index, progress))

        return listen


def _failure(message: str) -> RequestError:
    return RequestError(503 if "waited too long" in message else 500, message)
