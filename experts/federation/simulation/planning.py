"""Simulation of a federation before it starts: duration, traffic and failures.

The coordinator is the real one, with its ledger, requests, signatures and checks, in a temporary workspace. Owners are models on
a simulated clock that jumps from event to event.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from ....core.artefacts.files import is_alive
from ....core.errors import UserError
from ....core.reporting import SILENT, Reporter
from ..coordinator.coordinator import Coordinator
from ..rounds.round_plan import quorum_size
from .deliveries import RECIPE, StandIns, write_stand_in_seed
from .events import Events, Line, SimulatedClock
from .owners import OwnerTraits
from .plan import Plan
from .simulated_owner import HOUR, SimulatedOwner

IN_MEMORY = Path("/dev/shm")
PREFIX = "expertctl-simulation-"
BYTES_OF_OWNER = 80_000
"""Approximate disk space of one simulated owner."""
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Report:
    """Result of a simulation. Hours and bytes are simulated; seconds and memory are the cost of the simulation itself."""

    owners: int
    needed: int
    """Experts that the quorum requires."""
    hours_to_quorum: float | None
    """None if the quorum was not reached."""
    hours_to_all: float | None
    """None if not every owner was accepted."""
    hours_to: Mapping[str, float | None]
    """Hours until a share of all owners was accepted, by share; None if not reached."""
    accepted: int
    """Accepted experts in the coordinator's ledger."""
    refused: Mapping[str, int]
    """Refused owners by code."""
    late: int
    """Owners whose delivery came after the deadline."""
    never: int
    """Owners who did not deliver."""
    asked_again: int
    """Times that missing owners were asked again."""
    bytes_down: int
    bytes_up: int
    bytes_lost: int
    """Bytes of parts in transfer when an owner went offline; they were sent again."""
    line_hours_down: float
    """Hours that the coordinator's line was in use."""
    line_hours_up: float
    events: int
    seconds: float
    cpu_seconds: float
    events_per_second: float
    """Events divided by `seconds`."""
    peak_memory_bytes: int
    """Peak memory of the process."""

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON content."""
        return asdict(self)


def simulate(
    owners: Sequence[OwnerTraits],
    plan: Plan,
    clock: SimulatedClock | None = None,
    *,
    folder: Path | None = None,
    reporter: Reporter = SILENT,
) -> Report:
    """Simulate a federation and return a report.

    The same owners and plan give the same report, except for the cost of the simulation. `folder` holds the temporary workspace,
    about `BYTES_OF_OWNER` per owner; the default is a memory-backed folder if the system has one with enough room, since every
    write is flushed, which is slow on a disk.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    parent = folder or _memory_folder(len(owners))
    _remove_leftovers(parent or Path(gettempdir()))
    with TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", dir=parent) as scratch:
        world = _SimulatedFederation(owners, plan, clock or SimulatedClock(), Path(scratch), reporter)
        world.run()
        return world.report(time.perf_counter() - start, time.process_time() - cpu_start)


class _SimulatedFederation:
    """State of one simulation: the owners' `World`, and the counts for the report."""

    def __init__(
        self, owners: Sequence[OwnerTraits], plan: Plan, clock: SimulatedClock, scratch: Path, reporter: Reporter
    ) -> None:
        if not owners:
            raise UserError("a federation needs at least one owner")
        self.plan, self.clock, self._reporter = plan, clock, reporter
        self.events = Events(clock)
        layout = write_stand_in_seed(scratch / "coordinator")
        self.coordinator = Coordinator(layout, now=clock)
        self.stand_ins = StandIns(scratch / "owners", layout)
        self.down, self.up = (Line(plan.line_gbit * 125_000_000) for _ in range(2))
        self.lost_bytes = 0
        self.owners = [SimulatedOwner(number, traits, self) for number, traits in enumerate(owners)]
        self._accepted_at: list[float] = []
        self._settled: set[int] = set()
        self._asked_again = 0
        keys = {traits.name: self.stand_ins.new_key(traits.name).public for traits in owners}
        self.coordinator.files.members.add_all(keys)

    @property
    def needed(self) -> int:
        return quorum_size(self.plan.quorum, len(self.owners))

    def run(self) -> None:
        """Send the requests and run all events until four times the total time limit."""
        seconds = self.plan.deadline.total_seconds()
        self._ask()
        self.events.at(seconds + 1, self._deadline_passed)
        for owner in self.owners:
            owner.begin(self.plan.seed)
        self.events.run(until=4 * seconds * (self.plan.ask_again + 1))

    def _ask(self) -> None:
        names = [owner.traits.name for owner in self.owners]
        self.coordinator.ask(names, RECIPE, self.clock() + self.plan.deadline)

    def _deadline_passed(self) -> None:
        if len(self._accepted_at) >= self.needed or self._asked_again >= self.plan.ask_again:
            return
        self._asked_again += 1
        self._ask()
        self.events.after(self.plan.deadline.total_seconds() + 1, self._deadline_passed)
        for owner in self.owners:
            owner.ask_again()

    def settle(self, owner: SimulatedOwner) -> None:
        """Record an owner's outcome; see `World`."""
        self._settled.add(owner.number)
        if owner.outcome == "accepted":
            self._accepted_at.append(self.clock.seconds)
        if owner.outcome != "late":
            self.stand_ins.forget(owner.traits.name)
        self._reporter.progress("simulation", len(self._settled), len(self.owners), "owners settled")

    def report(self, seconds: float, cpu_seconds: float) -> Report:
        """Return the report after `run`."""
        outcomes = Counter(owner.outcome for owner in self.owners if owner.outcome != "accepted")
        late, never = outcomes.pop("late", 0), outcomes.pop("never", 0)
        count = len(self.owners)
        names = [owner.traits.name for owner in self.owners]
        missing = self.coordinator.files.ledger.missing(self.stand_ins.seed_digest, RECIPE.digest, names)
        return Report(
            owners=count,
            needed=self.needed,
            hours_to_quorum=self._hours_until(self.needed),
            hours_to_all=self._hours_until(count),
            hours_to={f"{share:.0%}": self._hours_until(quorum_size(share, count)) for share in SHARES},
            accepted=count - len(missing),
            refused=dict(sorted(outcomes.items())),
            late=late,
            never=never,
            asked_again=self._asked_again,
            bytes_down=self.down.carried,
            bytes_up=self.up.carried,
            bytes_lost=self.lost_bytes,
            line_hours_down=self.down.busy_seconds / HOUR,
            line_hours_up=self.up.busy_seconds / HOUR,
            events=self.events.done,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            events_per_second=self.events.done / seconds,
            peak_memory_bytes=_peak_memory(),
        )

    def _hours_until(self, accepted: int) -> float | None:
        """Return the hours until this many owners were accepted, or None."""
        return self._accepted_at[accepted - 1] / HOUR if len(self._accepted_at) >= accepted else None


def _memory_folder(owners: int) -> Path | None:
    """Return the system's memory-backed folder if the workspace fits into half of it, else None."""
    try:
        free = shutil.disk_usage(IN_MEMORY).free
    except OSError:
        return None
    return IN_MEMORY if os.access(IN_MEMORY, os.W_OK) and free > 2 * owners * BYTES_OF_OWNER else None


def _remove_leftovers(parent: Path) -> None:
    """Delete the folders of killed simulations, which may occupy memory."""
    for path in parent.glob(f"{PREFIX}*-*"):
        if not is_alive(path.name.removeprefix(PREFIX).partition("-")[0]):
            shutil.rmtree(path, ignore_errors=True)


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
