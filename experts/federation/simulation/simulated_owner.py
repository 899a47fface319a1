"""Model of an owner: it downloads the seed, trains and delivers whenever it is online.

An owner that goes offline loses what a real one would lose: the part in transfer, and the training since the last checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ....core.errors import UserError
from ....core.reporting import Reporter
from ..coordinator.coordinator import Coordinator
from ..protocol.delivery import SignedStatement
from ..protocol.keys import make_key
from ..protocol.parts import PART_BYTES, read_part
from ..protocol.requests import ExpertRequest, Progress
from ..rounds.rounds import quorum_size
from .deliveries import RECIPE, StandIns, write_stand_in_seed
from .events import Events, Line
from .owners import OwnerTraits, Plan

HOUR = 3600.0
Phase = Literal["away", "fetching", "training", "sending", "done"]
REPORTS = 4
"""Progress reports per training run."""


@dataclass
class SimulatedOwner:
    """One owner and its progress."""

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
    """Bytes of the seed or the expert that are still to be transferred."""
    trained: float = 0.0
    """Seconds of training done."""
    _resumed: float = 0.0
    """Seconds of training in the checkpoint from which training last resumed."""
    _since: float = 0.0
    """Time when training last resumed, in seconds."""
    _offline_until: float = 0.0
    _turn: int = 0
    """Number of activities started or interrupted; an event with an older number is void."""
    _in_transfer: int = 0
    """Bytes of the part in transfer."""
    _reports: int = 0
    """Progress reports sent."""
    _periods: Iterator[tuple[float, float]] = field(default_factory=lambda: iter(()))

    def begin(self, seed: int) -> None:
        """Schedule the owner's first connection, offline periods and departure."""
        events, traits = self.world.events, self.traits
        self._periods = _offline_periods(traits, random.Random(f"{seed}/{traits.name}/away"))
        events.at(traits.joins_hours * HOUR, self._connect)
        self._schedule_offline()
        if traits.leaves_hours:
            events.at(traits.leaves_hours * HOUR, self._leave)

    def ask_again(self) -> None:
        """React to a new deadline: a late owner delivers again, one that never saw the request starts."""
        if self.gone:
            return
        if self.request is not None:
            self.request = self.world.coordinator.files.request(self.request.id)
        if self.outcome == "late":
            self.outcome, self.phase = "never", "sending"
            self.left = self.world.plan.expert_bytes
        elif self.phase != "away":
            return  # already working on the request
        if self.online:
            self._resume_phase()

    # --- presence ---

    def _connect(self) -> None:
        is_offline = self.world.events.seconds < self._offline_until
        if not (self.online or is_offline or self.gone):
            self.online = True
            self._resume_phase()

    def _schedule_offline(self) -> None:
        period = next(self._periods, None)
        if period is not None:
            self.world.events.at(period[0], lambda: self._go_offline(period[1]))

    def _go_offline(self, back_at: float) -> None:
        if self.gone or self.phase == "done":
            return
        self._interrupt()
        self._offline_until = back_at
        self.world.events.at(max(back_at, self.traits.joins_hours * HOUR), self._connect)
        self.world.events.at(back_at, self._schedule_offline)

    def _leave(self) -> None:
        self.gone = True
        if self.phase != "done":
            self._interrupt()
            self.world.settle(self)

    def _interrupt(self) -> None:
        world = self.world
        if self.online and self.phase == "training":
            interval = world.plan.checkpoint_seconds
            self.trained = self._resumed + (world.events.seconds - self._since) // interval * interval
        world.lost_bytes += self._in_transfer
        self._in_transfer = 0
        self.online = False
        self._turn += 1

    # --- work ---

    def _resume_phase(self) -> None:
        if self.phase == "away" and (requests := self.world.coordinator.open_requests(self.traits.name)):
            self.request, self.phase, self.left = requests[0], "fetching", self.world.plan.seed_bytes
        if self.phase == "fetching":
            self._transfer(self.world.down, self.traits.download_mbit, self._resume_training)
        elif self.phase == "training":
            self._resume_training()
        elif self.phase == "sending":
            self._announce()

    def _transfer(self, line: Line, mbit: float, then: Callable[[], None]) -> None:
        """Transfer the remaining bytes part by part, then call `then`."""
        if not self.left:
            then()
            return
        size, turn = min(PART_BYTES, self.left), self._next_turn()
        self._in_transfer = size
        arrival = line.arrival(self.world.events.seconds, size, mbit * 125_000)

        def arrived() -> None:
            if turn == self._turn:
                self.left -= size
                self._in_transfer = 0
                self._transfer(line, mbit, then)

        self.world.events.at(arrival, arrived)

    def _resume_training(self) -> None:
        self.phase = "training"
        self._resumed, self._since = self.trained, self.world.events.seconds
        self._train()

    def _train(self) -> None:
        """Train until the next progress report or the end."""
        plan, turn = self.world.plan, self._next_turn()
        total_seconds = plan.tokens / self.traits.tokens_per_second
        target = total_seconds * (self._reports + 1) / REPORTS
        trained_before = self.trained

        def reached() -> None:
            if turn != self._turn:
                return
            self.trained = max(target, trained_before)
            self._reports += 1
            is_trained = self._reports == REPORTS
            seconds_left = max(total_seconds - self.trained, 0.0)
            progress = Progress("ready" if is_trained else "training", self._reports, REPORTS, None, seconds_left)
            assert self.request is not None
            self.world.coordinator.files.record_progress(self.request.id, progress, self.world.events.now())
            if not is_trained:
                self._train()
                return
            self.phase, self.left = "sending", plan.expert_bytes
            self._announce()

        self.world.events.after(max(target - trained_before, 0.0), reached)

    def _announce(self) -> None:
        """Send the signed statement, as an owner does at the start of a delivery and after every interruption."""
        world, request = self.world, self.request
        assert request is not None
        folder, signed = world.stand_ins.delivery(request, self.number, self.traits.delivers)
        missing = world.coordinator.begin(request, signed)
        if not isinstance(missing, dict):
            self._end(missing.code.name)
            return
        self._transfer(world.up, self.traits.upload_mbit, lambda: self._deliver(folder, signed, missing))

    def _deliver(self, folder: Path, signed: SignedStatement, missing: Mapping[str, list[int]]) -> None:
        """Hand the stand-in to the coordinator at the time when a full-size expert would have arrived."""
        coordinator, request = self.world.coordinator, self.request
        assert request is not None
        for file in signed.statement.files:
            for index in missing[file.name]:
                coordinator.files.put(request.id, file.name, index, read_part(folder / file.name, file, index))
        refusal = coordinator.finish(request)
        if refusal is None:
            self.world.stand_ins.last_accepted = self.number
        self._end(refusal.code.name if refusal is not None else "")

    def _end(self, refusal: str) -> None:
        self.phase = "done"
        self.outcome = {"": "accepted", "LATE": "late"}.get(refusal, refusal)
        self.world.settle(self)

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn


class World:
    """State of one simulation: the coordinator, its network line, the owners, and the counts for the report."""

    def __init__(self, owners: Sequence[OwnerTraits], plan: Plan, scratch: Path, reporter: Reporter) -> None:
        if not owners:
            raise UserError("a federation needs at least one owner")
        self.plan, self._reporter = plan, reporter
        self.events = Events()
        layout = write_stand_in_seed(scratch / "coordinator")
        self.coordinator = Coordinator(layout, now=self.events.now)
        self.stand_ins = StandIns(scratch / "owners", layout)
        self.down, self.up = (Line(plan.line_gbit * 125_000_000) for _ in range(2))
        self.lost_bytes = 0
        self.names = [traits.name for traits in owners]
        self.owners = [SimulatedOwner(number, traits, self) for number, traits in enumerate(owners)]
        self.needed = quorum_size(plan.quorum, len(owners))
        self.accepted_at: list[float] = []
        self._settled: set[int] = set()
        self.asked_again = 0
        keys = {name: make_key(self.stand_ins.root / name).public for name in self.names}
        self.coordinator.files.members.add_all(keys)

    def run(self) -> None:
        """Send the requests and run all events until four times the total time limit."""
        seconds = self.plan.deadline.total_seconds()
        self.coordinator.ask(self.names, RECIPE, self.events.now() + self.plan.deadline)
        self.events.at(seconds + 1, self._deadline_passed)
        for owner in self.owners:
            owner.begin(self.plan.seed)
        self.events.run(until=4 * seconds * (self.plan.ask_again + 1))

    def _deadline_passed(self) -> None:
        if len(self.accepted_at) >= self.needed or self.asked_again >= self.plan.ask_again:
            return
        self.asked_again += 1
        self.coordinator.ask(self.names, RECIPE, self.events.now() + self.plan.deadline)
        self.events.after(self.plan.deadline.total_seconds() + 1, self._deadline_passed)
        for owner in self.owners:
            owner.ask_again()

    def settle(self, owner: SimulatedOwner) -> None:
        """Record that an owner was accepted or refused, or has left for good."""
        self._settled.add(owner.number)
        if owner.outcome == "accepted":
            self.accepted_at.append(self.events.seconds)
        if owner.outcome != "late":
            self.stand_ins.forget(owner.traits.name)
        self._reporter.progress("simulation", len(self._settled), len(self.owners), "owners settled")


def _offline_periods(traits: OwnerTraits, source: random.Random) -> Iterator[tuple[float, float]]:
    """Yield the (begin, end) of each offline period, in seconds."""
    if traits.offline:
        yield from ((begin * HOUR, end * HOUR) for begin, end in traits.offline)
        return
    at = traits.joins_hours
    while traits.uptime_hours:
        at += source.expovariate(1 / traits.uptime_hours)
        back = at + (source.expovariate(1 / traits.downtime_hours) if traits.downtime_hours else 0.0)
        yield at * HOUR, back * HOUR
        at = back
