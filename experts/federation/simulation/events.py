"""Time that does not pass by itself: a clock, what is due on it, and the coordinator's line, on which parts stand in a queue."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

BEGIN = datetime(2030, 1, 1, tzinfo=UTC)
Act = Callable[[], None]


class SimulatedClock:
    """A clock that stands where the simulation is; called, it tells the time as the coordinator wants it."""

    def __init__(self, begin: datetime = BEGIN) -> None:
        self.begin, self.seconds = begin, 0.0
        """Seconds since `begin`."""

    def __call__(self) -> datetime:
        return self.begin + timedelta(seconds=self.seconds)


class Events:
    """What is due, in order of time; at the same time in the order in which it was planned."""

    def __init__(self, clock: SimulatedClock) -> None:
        self._clock = clock
        self._due: list[tuple[float, int, Act]] = []
        self._planned = 0
        self.done = 0

    def at(self, seconds: float, act: Act) -> None:
        """Plan something for a time (seconds since the clock's beginning), at once where that has passed."""
        self._planned += 1
        heapq.heappush(self._due, (max(seconds, self._clock.seconds), self._planned, act))

    def after(self, seconds: float, act: Act) -> None:
        """Plan something for so many seconds from now."""
        self.at(self._clock.seconds + seconds, act)

    def run(self, until: float) -> None:
        """Let everything happen that is due before a time."""
        while self._due and self._due[0][0] <= until:
            self._clock.seconds, _, act = heapq.heappop(self._due)
            self.done += 1
            act()


@dataclass
class Line:
    """One direction of the coordinator's line to the net. Parts pass it one after the other, in the order they were begun."""

    bytes_per_second: float
    free_at: float = 0.0
    carried: int = field(default=0)
    """Bytes, those included that were lost on the way."""

    def arrival(self, now: float, size: int, owner_bytes_per_second: float) -> float:
        """Begin to carry a part and return when it has arrived: the slower of the line, with its queue, and the owner's."""
        self.free_at = max(self.free_at, now) + size / self.bytes_per_second
        self.carried += size
        return max(self.free_at, now + size / owner_bytes_per_second)

    @property
    def busy_seconds(self) -> float:
        """How long it takes to carry what it carried."""
        return self.carried / self.bytes_per_second
