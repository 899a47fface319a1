"""Moving shared models on: owners are asked for the open round, rounds are closed, and the last one becomes a generalist."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from ....core.artefacts.files import exclusive
from ....core.artefacts.layout import check_name, require_free
from ....core.errors import UserError, first_line
from ..rounds.round_plan import RoundPlan, RoundReport
from ..rounds.shared_model import SETTINGS_FILE, SharedModel, SharedSettings
from .coordinator import Coordinator, digest_of_seed
from .shared_generalist import write_shared_generalist

PAUSE_S = 2.0


@dataclass(frozen=True)
class SharedStatus:
    """How one shared model stands."""

    name: str
    recipe: str
    state: str
    """`waiting` for owners, `short` of them after the deadline, `ready` to be closed, or `finished`."""
    number: int
    """Rounds that are closed."""
    total: int
    owners: int
    delivered: tuple[str, ...]
    """Owners who count in the open round so far."""
    missing: tuple[str, ...]
    needed: int
    deadline: datetime | None


def begin_rounds(
    coordinator: Coordinator, name: str, plan: RoundPlan, settings: SharedSettings
) -> SharedModel:
    """Begin the rounds of a shared model and ask for the first; begun already, give the open round its time once more.

    Owners who were refused or left out in the open round may then deliver after all. Raises `UserError` for owners who were not
    invited, for a name that is taken, and for other rounds of the same name.
    """
    now = _now(coordinator)
    for owner in plan.owners:
        coordinator.members.named(owner)
    root = coordinator.shared_root / check_name(name, "a shared model")
    with exclusive(_lock(root), f"shared model '{name}'"):
        if not (root / SETTINGS_FILE).is_file():
            layout = coordinator.layout
            require_free(layout, name, root)
            if not (layout.seed / "seed.json").is_file():
                raise UserError("there is no finished seed to begin with; make one with `expertctl seed`")
            SharedModel.begin(root, layout.seed, plan, settings, now)
        else:
            _give_more_time(SharedModel(root), plan, settings, now)
    shared = SharedModel(root)
    advance(coordinator, shared)
    return shared


def advance(coordinator: Coordinator, shared: SharedModel) -> list[str]:
    """Do for a shared model what can be done now, and return what is to be said of it.

    Killed at any point and called again, it ends in the same model. Raises `UserError` while another process does the same.
    """
    said: list[str] = []
    if shared.is_finished:
        return said
    with exclusive(_lock(shared.root), f"shared model '{shared.name}'"):
        while not shared.is_trained:
            said += _ask(coordinator, shared)
            if shared.rounds.state(_now(coordinator)) != "ready":
                return said + _shortage(coordinator, shared)
            said.append(_closed(shared, shared.rounds.close(_now(coordinator))))
        manifest = write_shared_generalist(coordinator, shared)
        shared.finish(manifest.digest)
        said.append(f"'{shared.name}' is finished: generalists/{shared.name}")
    return said


def keep_rounds(
    coordinator: Coordinator, tell: Callable[[str], None], stop: threading.Event, pause_s: float = PAUSE_S
) -> None:
    """Move all shared models on until `stop` is set; what goes wrong is told once, and tried again."""
    told: dict[str, str] = {}
    while not stop.wait(pause_s):
        for name, shared in coordinator.shared_models().items():
            try:
                said = advance(coordinator, shared)
            except UserError as error:
                said = [f"'{name}' cannot go on: {first_line(error)}"]
            for line in said:
                if told.get(name) != line:
                    told[name] = line
                    tell(line)


def status_of(coordinator: Coordinator, shared: SharedModel) -> SharedStatus:
    """Return how a shared model stands."""
    rounds, plan = shared.rounds, shared.rounds.plan
    over = shared.is_trained
    state = "finished" if shared.is_finished else rounds.state(_now(coordinator)) if not over else "ready"
    return SharedStatus(
        shared.name,
        plan.recipe,
        state,
        rounds.number,
        shared.settings.total,
        len(plan.owners),
        () if over else tuple(rounds.delivered()),
        () if over else tuple(rounds.missing()),
        plan.needed,
        None if over else rounds.deadline,
    )


def _give_more_time(shared: SharedModel, plan: RoundPlan, settings: SharedSettings, now: datetime) -> None:
    same_time = replace(plan, round_seconds=shared.rounds.plan.round_seconds)
    if shared.settings != settings or shared.rounds.plan != same_time:
        raise UserError(
            f"'{shared.name}' is being trained with other owners or settings; ask as before to give it more time, or choose "
            "another --name"
        )
    if shared.is_trained:
        raise UserError(f"all rounds of '{shared.name}' are closed; choose another --name")
    deadline = now + timedelta(seconds=plan.round_seconds)
    if deadline > shared.rounds.deadline:
        shared.rounds.extend(deadline)
    shared.rounds.ask_again()


def _ask(coordinator: Coordinator, shared: SharedModel) -> list[str]:
    """Ask whoever is missing and has no request for the open round, or one that ends before it."""
    rounds, recipe, seed = shared.rounds, shared.recipe(), shared.seed_folder()
    digest = digest_of_seed(seed)
    known = {member.name for member in coordinator.members.all()}
    for owner in rounds.missing():
        if owner not in known:
            rounds.leave_out(owner, "REMOVED", "it is no member any more")
    until = rounds.deadline.replace(microsecond=0)
    due = []
    for owner in rounds.missing():
        old = coordinator.latest(owner, digest, recipe.digest)
        if old is None or old.deadline < until:
            due.append(owner)
    asked = coordinator.ask(due, recipe, until, seed) if due else []
    if not asked:
        return []
    return [
        f"{recipe.round}: {_listed([request.owner for request in asked])} asked until {until:%Y-%m-%d %H:%M} UTC"
    ]


def _shortage(coordinator: Coordinator, shared: SharedModel) -> list[str]:
    found = status_of(coordinator, shared)
    if found.state != "short":
        return []
    return [
        f"round {found.number + 1} of {found.total} of '{found.name}' has {len(found.delivered)} of {found.owners} owners "
        f"and needs {found.needed}; give it more time: the same `expertctl federate ask` again"
    ]


def _closed(shared: SharedModel, report: RoundReport) -> str:
    said = f"round {report.number + 1} of {shared.settings.total} of '{shared.name}': {_listed(list(report.shares))} averaged"
    without = [*report.refused, *report.missing]
    return f"{said}, without {_listed(sorted(without))}" if without else said


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _now(coordinator: Coordinator) -> datetime:
    return coordinator.now().replace(microsecond=0)


def _lock(root: Path) -> Path:
    return root.parent / ".locks" / root.name
