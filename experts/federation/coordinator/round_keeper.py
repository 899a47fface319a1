"""Progress of shared models: request the open round from owners, close rounds, and write the final generalist."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from operator import itemgetter
from pathlib import Path

from ....core.artefacts.files import exclusive, link_or_copy, new_folder
from ....core.artefacts.layout import check_name, require_free
from ....core.errors import UserError, first_line
from ....core.manifests.finishing import finish_artefact
from ....core.manifests.generalist import GeneralistConfig
from ....core.manifests.manifest import Manifest, Parent, read_manifest
from ....core.manifests.statements import DataStatement
from ....core.reporting import Reporter
from ..rounds.rounds import RoundPlan
from ..rounds.shared_model import SETTINGS_FILE, SharedModel, SharedSettings
from .coordinator import Coordinator, digest_of_seed

PAUSE_S = 2.0
"""Seconds between two passes over all shared models."""


@dataclass(frozen=True)
class SharedStatus:
    """Status of one shared model."""

    name: str
    recipe: str
    state: str
    """`waiting` for owners, `short` of owners after the deadline, `ready` to be closed, or `finished`."""
    number: int
    """Closed rounds."""
    total: int
    """Planned rounds."""
    owners: int
    delivered: tuple[str, ...]
    """Owners with an accepted delivery in the open round."""
    missing: tuple[str, ...]
    """Owners who have neither delivered nor been refused in the open round."""
    needed: int
    """Owners that the quorum requires."""
    deadline: datetime | None
    """Deadline of the open round; None when all rounds are closed."""


def begin_rounds(coordinator: Coordinator, name: str, plan: RoundPlan, settings: SharedSettings) -> SharedModel:
    """Create a shared model and request its first round; if it exists, extend the deadline of the open round.

    An extension also readmits owners who were refused or left out of the open round. Raises `UserError` for owners who are not
    members, for a name in use, and if the shared model exists with another plan or settings.
    """
    now, layout = _now(coordinator), coordinator.layout
    for owner in plan.owners:
        coordinator.files.members.get(owner)
    root = coordinator.files.shared_root / check_name(name, "a shared model")
    with _locked(root):
        if (root / SETTINGS_FILE).is_file():
            shared = SharedModel(root)
            _extend_open_round(shared, plan, settings, now)
        else:
            require_free(layout, name, root)
            digest_of_seed(layout.seed)  # raises without a finished seed
            shared = SharedModel.begin(root, layout.seed, plan, settings, now)
    advance(coordinator, shared)
    return shared


def advance(coordinator: Coordinator, shared: SharedModel) -> list[str]:
    """Take every step that a shared model allows now, and return messages about them.

    Killed at any point and called again, it ends in the same model. Raises `UserError` while another process is advancing it.
    """
    messages: list[str] = []
    if shared.is_finished:
        return messages
    with _locked(shared.root):
        while not shared.is_trained:
            messages += _request_missing(coordinator, shared)
            if shared.rounds.state(_now(coordinator)) != "ready":
                status = status_of(coordinator, shared)
                if status.state == "short":
                    messages.append(
                        f"round {status.number + 1} of {status.total} of '{status.name}' has {len(status.delivered)} of "
                        f"{status.owners} owners and needs {status.needed}; repeat the same `expertctl federate ask` to "
                        "extend its deadline"
                    )
                return messages
            report = shared.rounds.close(_now(coordinator))
            excluded = sorted([*report.refused, *report.missing])
            averaged = [
                f"{owner} ({late} late)" if (late := report.late.get(owner)) else owner for owner in report.shares
            ]
            messages.append(
                f"round {report.number + 1} of {shared.settings.total} of '{shared.name}': "
                f"{_enumerate(averaged)} averaged{f', without {_enumerate(excluded)}' if excluded else ''}"
            )
        shared.finish(_write_generalist(coordinator, shared))
        messages.append(f"'{shared.name}' is finished: generalists/{shared.name}")
    return messages


def keep_rounds(coordinator: Coordinator, reporter: Reporter, stop: threading.Event, pause_s: float = PAUSE_S) -> None:
    """Advance all shared models until `stop` is set; errors are reported once and retried."""
    reported: dict[str, str] = {}
    while not stop.wait(pause_s):
        for name, shared in coordinator.shared_models().items():
            try:
                messages = advance(coordinator, shared)
            except UserError as error:
                messages = [f"'{name}' cannot advance: {first_line(error)}"]
            for message in messages:
                if reported.get(name) != message:
                    reported[name] = message
                    reporter.say(message)


def status_of(coordinator: Coordinator, shared: SharedModel) -> SharedStatus:
    """Return the status of a shared model."""
    rounds, plan = shared.rounds, shared.rounds.plan
    is_trained = shared.is_trained
    state = "finished" if shared.is_finished else "ready" if is_trained else rounds.state(_now(coordinator))
    return SharedStatus(
        shared.name,
        plan.recipe,
        state,
        rounds.number,
        shared.settings.total,
        len(plan.owners),
        () if is_trained else tuple(rounds.delivered()),
        () if is_trained else tuple(rounds.missing()),
        plan.needed,
        None if is_trained else rounds.open.deadline,
    )


def _extend_open_round(shared: SharedModel, plan: RoundPlan, settings: SharedSettings, now: datetime) -> None:
    expected = replace(plan, round_seconds=shared.rounds.plan.round_seconds)
    if shared.settings != settings or shared.rounds.plan != expected:
        raise UserError(
            f"'{shared.name}' is being trained with other owners or settings; repeat the first command to extend its deadline, "
            "or choose another --name"
        )
    if shared.is_trained:
        raise UserError(f"all rounds of '{shared.name}' are closed; choose another --name")
    deadline = now + timedelta(seconds=plan.round_seconds)
    if deadline > shared.rounds.open.deadline:
        shared.rounds.extend(deadline)
    shared.rounds.readmit_owners()


def _request_missing(coordinator: Coordinator, shared: SharedModel) -> list[str]:
    """Send requests for the open round to missing owners without one, or with one that ends before the round.

    An owner who trains for an earlier round that still counts finishes that first.
    """
    rounds, recipe, seed = shared.rounds, shared.recipe(), shared.seed_folder()
    digest = digest_of_seed(seed)
    member_names = {member.name for member in coordinator.files.members.all()}
    for owner in rounds.missing():
        if owner not in member_names:
            rounds.leave_out(owner, "REMOVED", "no longer a member")
    late = timedelta(seconds=rounds.plan.round_seconds) * rounds.plan.late_rounds
    deadline = rounds.open.deadline.replace(microsecond=0) + late
    if deadline <= _now(coordinator):
        return []  # nobody can deliver any more, unless the deadline is extended
    asked = [owner for owner in rounds.missing() if not coordinator.is_training_for_earlier_round(owner, shared)]
    open_requests = {owner: coordinator.open_request(owner, digest, recipe.digest) for owner in asked}
    due = [owner for owner, request in open_requests.items() if request is None or request.deadline < deadline]
    requests = coordinator.ask(due, recipe, deadline, seed, priority=shared.settings.priority) if due else []
    if not requests:
        return []
    owners = _enumerate([request.owner for request in requests])
    return [f"{recipe.round}: {owners} asked until {deadline:%Y-%m-%d %H:%M} UTC"]


def _write_generalist(coordinator: Coordinator, shared: SharedModel) -> str:
    """Write `generalists/NAME`, unless it exists with the same weights, and return its digest.

    Raises `UserError` if another artefact has the name.
    """
    rounds, last = shared.rounds, shared.seed_folder()
    target, seed = coordinator.layout.generalists / shared.name, read_manifest(last)
    if (target / "generalist.json").is_file() and read_manifest(target).digest == seed.digest:
        return seed.digest
    reports = [rounds.report(number) for number in range(shared.settings.total)]
    manifest = Manifest(
        kind="generalist",
        name=shared.name,
        tokenizer=seed.tokenizer,
        parents=(Parent("seed", "seed", rounds.start, None, seed.owner, seed.licence),),
        config=GeneralistConfig(
            method=rounds.plan.recipe,
            kind="shared",
            options={
                "quorum": rounds.plan.quorum,
                "grace_seconds": rounds.plan.grace_seconds,
                "late_rounds": rounds.plan.late_rounds,
                **asdict(rounds.plan.rules),
            },
            training={**shared.settings.training, "steps_per_round": shared.settings.steps},
            rounds=tuple(asdict(report) for report in reports),
        ),
        expert_data=_statements(coordinator, shared),
        licence=seed.licence,
    )
    with new_folder(target, what="generalist") as partial:
        for path in sorted(last.iterdir()):
            if path.name not in ("seed.json", "README.md"):
                link_or_copy(path, partial / path.name)
        return finish_artefact(partial, manifest).digest


def _statements(coordinator: Coordinator, shared: SharedModel) -> dict[str, DataStatement]:
    """Return the data statement of each owner's latest accepted delivery."""
    latest: dict[str, tuple[int, DataStatement]] = {}
    for request, signed in coordinator.files.accepted():
        round_ = request.recipe.round
        if round_ is not None and round_.rounds == shared.identifier:
            statement = round_.number, signed.statement.data
            latest[request.owner] = max(latest.get(request.owner, statement), statement, key=itemgetter(0))
    return {owner: DataStatement(data.domains) for owner, (_, data) in sorted(latest.items())}


def _enumerate(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _now(coordinator: Coordinator) -> datetime:
    return coordinator.now().replace(microsecond=0)


def _locked(root: Path) -> AbstractContextManager[None]:
    return exclusive(root.parent / ".locks" / root.name, f"shared model '{root.name}'")
