"""An owner as a model: it fetches the seed, trains and hands in, whenever it is there.

What it was doing when it dropped out is lost as far as a real owner would lose it: the part that was on the line, and the
training since the last checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from ..coordinator.coordinator import Coordinator
from ..protocol.parts import PART_BYTES, read_part
from ..protocol.progress import Progress
from ..protocol.requests import ExpertRequest
from .deliveries import StandIns
from .events import Events, Line, SimulatedClock
from .owners import OwnerTraits

if TYPE_CHECKING:
    from .plan import Plan

HOUR = 3600.0
Phase = Literal["away", "fetching", "training", "sending", "done"]
TOLD = 4
"""Times that an owner tells how its training goes."""


class World(Protocol):
    """What owners share."""

    plan: Plan
    clock: SimulatedClock
    events: Events
    coordinator: Coordinator
    stand_ins: StandIns
    down: Line
    up: Line
    lost_bytes: int

    def settled(self, owner: SimulatedOwner) -> None:
        """Hear that an owner was accepted, refused or is gone for good."""


@dataclass
class SimulatedOwner:
    """One owner, and how far it is."""

    number: int
    traits: OwnerTraits
    world: World
    phase: Phase = "away"
    online: bool = False
    gone: bool = False
    """Whether it has left for good."""
    outcome: str = "never"
    """`accepted`, `late`, `never`, or the code of a refusal."""
    request: ExpertRequest | None = None
    left: int = 0
    """Bytes of the seed or of the expert that are still to be carried."""
    trained: float = 0.0
    """Seconds of training that are done."""
    _resumed: float = 0.0
    """Of them, those that were done when the training was last taken up, from a checkpoint."""
    _since: float = 0.0
    """When that was."""
    _away_until: float = 0.0
    _turn: int = 0
    """Counts what it began, so that what was broken off is known when it comes due."""
    _on_line: int = 0
    _told: int = 0
    _spans: Iterator[tuple[float, float]] = field(default_factory=lambda: iter(()))

    def begin(self, seed: int) -> None:
        """Plan when it comes for the first time, and when it goes for good."""
        events, traits = self.world.events, self.traits
        self._spans = _away(traits, random.Random(f"{seed}/{traits.name}/away"))
        events.at(traits.joins_hours * HOUR, self._come)
        self._plan_leave()
        if traits.leaves_hours:
            events.at(traits.leaves_hours * HOUR, self._go_for_good)

    def ask_again(self) -> None:
        """Hear of a new deadline: one who was too late hands in again, one who never heard of it begins."""
        if self.gone:
            return
        if self.outcome == "late":
            self.outcome, self.phase = "never", "sending"
            self.left = self.world.plan.expert_bytes
        elif self.phase != "away":
            return  # it is at it
        if self.online:
            self._go_on()

    # --- being there ---

    def _come(self) -> None:
        is_away = self.world.clock.seconds < self._away_until
        if not (self.online or is_away or self.gone):
            self.online = True
            self._go_on()

    def _plan_leave(self) -> None:
        span = next(self._spans, None)
        if span is not None:
            self.world.events.at(span[0], lambda: self._drop_out(span[1]))

    def _drop_out(self, back_at: float) -> None:
        if self.gone or self.phase == "done":
            return
        self._break_off()
        self._away_until = back_at
        self.world.events.at(max(back_at, self.traits.joins_hours * HOUR), self._come)
        self.world.events.at(back_at, self._plan_leave)

    def _go_for_good(self) -> None:
        self.gone = True
        if self.phase != "done":
            self._break_off()
            self.world.settled(self)

    def _break_off(self) -> None:
        world = self.world
        if self.online and self.phase == "training":
            every = world.plan.checkpoint_seconds
            self.trained = self._resumed + (world.clock.seconds - self._since) // every * every
        world.lost_bytes += self._on_line
        self._on_line = 0
        self.online = False
        self._turn += 1

    # --- what it does ---

    def _go_on(self) -> None:
        """Take up what it is at."""
        if self.phase == "away":
            self._take_request()
        if self.phase == "fetching":
            self._carry(self.world.down, self.traits.download_mbit, self._seed_is_here)
        elif self.phase == "training":
            self._resume()
        elif self.phase == "sending":
            self._announce()

    def _take_request(self) -> None:
        found = self.world.coordinator.open_requests(self.traits.name)
        if found:  # else it came after the deadline
            self.request, self.phase, self.left = found[0], "fetching", self.world.plan.seed_bytes

    def _carry(self, line: Line, mbit: float, then: Callable[[], None]) -> None:
        """Carry what is left, a part at a time."""
        if not self.left:
            then()
            return
        size, turn = min(PART_BYTES, self.left), self._begin()
        self._on_line = size
        arrival = line.arrival(self.world.clock.seconds, size, mbit * 125_000)

        def arrived() -> None:
            if turn == self._turn:
                self.left -= size
                self._on_line = 0
                self._carry(line, mbit, then)

        self.world.events.at(arrival, arrived)

    def _seed_is_here(self) -> None:
        self.phase = "training"
        self._resume()

    def _resume(self) -> None:
        self._resumed, self._since = self.trained, self.world.clock.seconds
        self._train()

    def _train(self) -> None:
        """Train to the next time that it tells how far it is, or to the end."""
        plan, turn = self.world.plan, self._begin()
        whole = plan.tokens / self.traits.tokens_per_second
        target = whole * (self._told + 1) / TOLD
        begun_with = self.trained

        def reached() -> None:
            if turn != self._turn:
                return
            self.trained = max(target, begun_with)
            self._told += 1
            self._tell(whole)
            if self._told < TOLD:
                self._train()
                return
            self.phase, self.left = "sending", plan.expert_bytes
            self._announce()

        self.world.events.after(max(target - begun_with, 0.0), reached)

    def _tell(self, whole: float) -> None:
        assert self.request is not None
        state: Literal["training", "ready"] = "training" if self._told < TOLD else "ready"
        progress = Progress(state, self._told, TOLD, seconds_left=max(whole - self.trained, 0.0))
        self.world.coordinator.note_progress(self.traits.name, self.request.id, progress)

    def _announce(self) -> None:
        """Begin to hand in, or go on with it, as an owner does after every cut: with the signed statement."""
        world, request = self.world, self.request
        assert request is not None
        folder, signed = world.stand_ins.made(request, self.number, self.traits.delivers)
        wanted = world.coordinator.begin(request.owner, request.id, signed)
        if not isinstance(wanted, dict):
            self._end(wanted.code.name)
            return
        self._carry(world.up, self.traits.upload_mbit, lambda: self._hand_in(request, folder, wanted))

    def _hand_in(self, request: ExpertRequest, folder: Path, wanted: Mapping[str, list[int]]) -> None:
        """Let the coordinator have what stands for the expert, now that all of it would have arrived."""
        coordinator = self.world.coordinator
        for name, file in self.world.stand_ins.files(request.owner).items():
            for index in wanted[name]:
                coordinator.put(request.owner, request.id, name, index, read_part(folder / name, file, index))
        refusal = coordinator.finish(request.owner, request.id)
        if refusal is None:
            self.world.stand_ins.last_accepted = self.number
        self._end(refusal.code.name if refusal is not None else "")

    def _end(self, refusal: str) -> None:
        self.phase = "done"
        self.outcome = {"": "accepted", "LATE": "late"}.get(refusal, refusal)
        self.world.settled(self)

    def _begin(self) -> int:
        self._turn += 1
        return self._turn


def _away(traits: OwnerTraits, source: random.Random) -> Iterator[tuple[float, float]]:
    """Yield when an owner drops out and when it is back, in seconds."""
    if traits.offline:
        yield from ((begin * HOUR, end * HOUR) for begin, end in traits.offline)
        return
    at = traits.joins_hours
    while traits.uptime_hours:
        at += source.expovariate(1 / traits.uptime_hours)
        back = at + (source.expovariate(1 / traits.downtime_hours) if traits.downtime_hours else 0.0)
        yield at * HOUR, back * HOUR
        at = back
