"""Discrete-event simulation: a simulated clock, an event queue, and the coordinator's network line with its queue."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

BEGIN = datetime(2030, 1, 1, tzinfo=UTC)
Act = Callable[[], None]


class Events:
    """Simulated clock and event queue, ordered by time and then by the order of scheduling."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Time since `BEGIN`."""
        self._due: list[tuple[float, int, Act]] = []
        self._scheduled = 0
        self.done = 0
        """Number of events run."""

    def now(self) -> datetime:
        """Return the simulated time."""
        return BEGIN + timedelta(seconds=self.seconds)

    def at(self, seconds: float, act: Act) -> None:
        """Schedule an event at a time in seconds; a past time means now."""
        self._scheduled += 1
        heapq.heappush(self._due, (max(seconds, self.seconds), self._scheduled, act))

    def after(self, seconds: float, act: Act) -> None:
        """Schedule an event after a delay in seconds."""
        self.at(self.seconds + seconds, act)

    def run(self, until: float) -> None:
        """Run all events due by a time, including those scheduled meanwhile."""
        while self._due and self._due[0][0] <= until:
            self.seconds, _, act = heapq.heappop(self._due)
            self.done += 1
            act()


@dataclass
class Line:
    """One direction of the coordinator's network line; parts pass one after another, in the order of their start."""

    bytes_per_second: float
    free_at: float = 0.0
    """Time when the queue is empty, in seconds."""
    carried: int = 0
    """Bytes carried, including lost parts."""

    def arrival(self, now: float, size: int, owner_bytes_per_second: float) -> float:
        """Queue a part and return its arrival time: the later of this line, with its queue, and the owner's connection."""
        self.free_at = max(self.free_at, now) + size / self.bytes_per_second
        self.carried += size
        return max(self.free_at, now + size / owner_bytes_per_second)

    @property
    def busy_seconds(self) -> float:
        """Time in use, in seconds."""
        return self.carried / self.bytes_per_second
