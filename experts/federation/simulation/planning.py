"""Playing a federation through before it begins: how long it takes, what it carries, who fails.

The coordinator is the real one, with its ledger, requests, signatures and checks, on a workspace that is thrown away; owners are
a model on a clock that jumps from event to event. Nothing waits.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from ....core.artefacts.files import is_alive
from ....core.errors import UserError
from ..coordinator.coordinator import Coordinator
from ..rounds.round_plan import needed_of
from .deliveries import RECIPE, StandIns, write_stand_in_seed
from .events import Events, Line, SimulatedClock
from .owners import OwnerTraits
from .plan import Plan
from .simulated_owner import HOUR, SimulatedOwner

IN_MEMORY = Path("/dev/shm")
PREFIX = "expertctl-simulation-"
BYTES_OF_OWNER = 80_000
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Report:
    """How a simulated federation went. Hours and bytes are the simulation's, seconds and memory its own cost."""

    owners: int
    needed: int
    """Experts that make the quorum."""
    hours_to_quorum: float | None
    hours_to_all: float | None
    """None where not everyone was accepted."""
    hours_to: Mapping[str, float | None]
    """Until a share of all owners was accepted."""
    accepted: int
    """As the coordinator's ledger has it."""
    refused: Mapping[str, int]
    """By code."""
    late: int
    never: int
    asked_again: int
    bytes_down: int
    bytes_up: int
    bytes_lost: int
    """Of them: parts that were on the line when an owner dropped out, and had to be sent again."""
    line_hours_down: float
    """How long the coordinator's line was in use."""
    line_hours_up: float
    events: int
    seconds: float
    cpu_seconds: float
    events_per_second: float
    """By `seconds`."""
    peak_memory_bytes: int
    """Of the process."""

    def as_json(self) -> dict[str, Any]:
        """Return the content of a JSON object."""
        return asdict(self)


def simulate(
    owners: Sequence[OwnerTraits],
    plan: Plan,
    clock: SimulatedClock | None = None,
    *,
    folder: Path | None = None,
    told: Callable[[int], None] = lambda settled: None,
) -> Report:
    """Play a federation of these owners through and report.

    The same owners and plan give the same report, but for its own cost. `folder` holds the coordinator's workspace meanwhile,
    which takes about `BYTES_OF_OWNER` for each owner (default: in memory where the system has such a folder with room, since
    every write is made to last, which a disk takes long for); `told` hears how many owners are settled.
    """
    began, used = time.perf_counter(), time.process_time()
    where = folder or _scratch_place(len(owners))
    _clear_killed(where or Path(gettempdir()))
    with TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", dir=where) as scratch:
        world = _Federation(owners, plan, clock or SimulatedClock(), Path(scratch), told)
        world.run()
        return world.report(time.perf_counter() - began, time.process_time() - used)


class _Federation:
    """Everything that one simulation holds: what owners share (see `World`), and what is reported."""

    def __init__(
        self,
        owners: Sequence[OwnerTraits],
        plan: Plan,
        clock: SimulatedClock,
        scratch: Path,
        told: Callable[[int], None],
    ) -> None:
        if not owners:
            raise UserError("a federation needs at least one owner")
        self.plan, self.clock, self._told = plan, clock, told
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
        keys = {one.traits.name: self.stand_ins.new_key(one.traits.name).public for one in self.owners}
        self.coordinator.members.add_all(keys)

    @property
    def needed(self) -> int:
        return needed_of(self.plan.quorum, len(self.owners))

    def run(self) -> None:
        """Ask, and let everything happen until all owners are settled, or nobody can be any more."""
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

    def settled(self, owner: SimulatedOwner) -> None:
        """Note how an owner came out; see `World`."""
        self._settled.add(owner.number)
        if owner.outcome == "accepted":
            self._accepted_at.append(self.clock.seconds)
        if owner.outcome != "late":
            self.stand_ins.forget(owner.traits.name)
        self._told(len(self._settled))

    def report(self, seconds: float, cpu_seconds: float) -> Report:
        """Sum up, once it has run."""
        outcomes = Counter(owner.outcome for owner in self.owners if owner.outcome != "accepted")
        late, never = outcomes.pop("late", 0), outcomes.pop("never", 0)
        count = len(self.owners)
        names = [owner.traits.name for owner in self.owners]
        missing = self.coordinator.ledger.missing(self.stand_ins.seed_digest, RECIPE.digest, names)
        return Report(
            owners=count,
            needed=self.needed,
            hours_to_quorum=self._hours_until(self.needed),
            hours_to_all=self._hours_until(count),
            hours_to={f"{share:.0%}": self._hours_until(needed_of(share, count)) for share in SHARES},
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
        """Return when so many were accepted."""
        return self._accepted_at[accepted - 1] / HOUR if len(self._accepted_at) >= accepted else None


def _scratch_place(owners: int) -> Path | None:
    """Return the system's folder in memory if all fits into half of it, else None."""
    try:
        free = shutil.disk_usage(IN_MEMORY).free
    except OSError:
        return None
    return IN_MEMORY if os.access(IN_MEMORY, os.W_OK) and free > 2 * owners * BYTES_OF_OWNER else None


def _clear_killed(where: Path) -> None:
    """Remove what simulations left whose process was killed: it may be memory that lies there."""
    for path in where.glob(f"{PREFIX}*-*"):
        if not is_alive(path.name.removeprefix(PREFIX).partition("-")[0]):
            shutil.rmtree(path, ignore_errors=True)


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
