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
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from ....core.artefacts.files import is_alive
from ....core.reporting import SILENT, Reporter
from ..rounds.rounds import quorum_size
from .deliveries import RECIPE
from .owners import OwnerTraits, Plan
from .simulated_owner import HOUR, World

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


def simulate(
    owners: Sequence[OwnerTraits], plan: Plan, *, folder: Path | None = None, reporter: Reporter = SILENT
) -> Report:
    """Simulate a federation and return a report.

    The same owners and plan give the same report, except for the cost of the simulation. `folder` holds the temporary workspace,
    about `BYTES_OF_OWNER` per owner; the default is a memory-backed folder if the system has one with enough room, since every
    write is flushed, which is slow on a disk.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    parent = folder or _memory_folder(len(owners))
    for path in (parent or Path(gettempdir())).glob(f"{PREFIX}*-*"):  # of killed simulations; they may occupy memory
        if not is_alive(path.name.removeprefix(PREFIX).partition("-")[0]):
            shutil.rmtree(path, ignore_errors=True)
    with TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", dir=parent) as scratch:
        world = World(owners, plan, Path(scratch), reporter)
        world.run()
        return _report(world, time.perf_counter() - start, time.process_time() - cpu_start)


def _report(world: World, seconds: float, cpu_seconds: float) -> Report:
    outcomes = Counter(owner.outcome for owner in world.owners if owner.outcome != "accepted")
    late, never = outcomes.pop("late", 0), outcomes.pop("never", 0)
    count, accepted_at = len(world.owners), world.accepted_at

    def hours_until(accepted: int) -> float | None:
        return accepted_at[accepted - 1] / HOUR if len(accepted_at) >= accepted else None

    missing = world.coordinator.files.ledger.missing(world.stand_ins.seed_digest, RECIPE.digest, world.names)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Report(
        owners=count,
        needed=world.needed,
        hours_to_quorum=hours_until(world.needed),
        hours_to_all=hours_until(count),
        hours_to={f"{share:.0%}": hours_until(quorum_size(share, count)) for share in SHARES},
        accepted=count - len(missing),
        refused=dict(sorted(outcomes.items())),
        late=late,
        never=never,
        asked_again=world.asked_again,
        bytes_down=world.down.carried,
        bytes_up=world.up.carried,
        bytes_lost=world.lost_bytes,
        line_hours_down=world.down.busy_seconds / HOUR,
        line_hours_up=world.up.busy_seconds / HOUR,
        events=world.events.done,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        events_per_second=world.events.done / seconds,
        peak_memory_bytes=peak if sys.platform == "darwin" else peak * 1024,
    )


def _memory_folder(owners: int) -> Path | None:
    """Return the system's memory-backed folder if the workspace fits into half of it, else None."""
    try:
        free = shutil.disk_usage(IN_MEMORY).free
    except OSError:
        return None
    return IN_MEMORY if os.access(IN_MEMORY, os.W_OK) and free > 2 * owners * BYTES_OF_OWNER else None
