"""Status of every owner of a federation, from the coordinator's files."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ....core.artefacts.files import read_json
from ..protocol.progress import Progress
from ..protocol.requests import ExpertRequest, without_superseded
from .coordinator import Coordinator
from .ledger import Entry, State
from .presence import ONLINE_WITHIN


@dataclass(frozen=True)
class OwnerStatus:
    """Status of one owner and one of its requests, if it has any."""

    name: str
    online: bool
    seen: datetime | None
    """When the owner was last heard from; None if never."""
    request: str | None = None
    """Identifier of the request; None without one, as are the fields below."""
    state: State | None = None
    detail: str = ""
    progress: Progress | None = None
    deadline: datetime | None = None


def owner_statuses(coordinator: Coordinator) -> list[OwnerStatus]:
    """Return the status of every member: one entry for each current request, or one for a member without requests."""
    heard, now = coordinator.presence.heard(), coordinator.now()
    statuses = []
    for member in coordinator.members.all():
        entries = coordinator.ledger.states_of(member.name)
        current = without_superseded([coordinator.request(identifier) for identifier in entries])
        progress = {request.id: _progress(coordinator, request) for request in current}
        times = [at for _, at in progress.values() if at is not None]
        seen = max([*times, *([heard[member.name]] if member.name in heard else [])], default=None)
        online = member.name in heard and now - heard[member.name] <= ONLINE_WITHIN
        if not current:
            statuses.append(OwnerStatus(member.name, online, seen))
        for request in current:
            entry = entries[request.id]
            statuses.append(
                OwnerStatus(
                    member.name,
                    online,
                    seen,
                    request.id,
                    entry.state,
                    _detail(coordinator, entry, request),
                    progress[request.id][0],
                    request.deadline,
                )
            )
    return statuses


def _detail(coordinator: Coordinator, entry: Entry, request: ExpertRequest) -> str:
    if entry.state != "asked":
        return entry.detail
    if request.deadline <= coordinator.now():
        return "the deadline has passed"
    return _handout_problem(coordinator, request) or str(request.recipe.round or "")


def _handout_problem(coordinator: Coordinator, request: ExpertRequest) -> str:
    """Return a message if the owner's node did not take the request, else an empty text."""
    path = coordinator.root / "handed" / f"{request.id}.json"
    code = read_json(path)["code"] if path.is_file() else "TAKEN"
    return "" if code == "TAKEN" else f"the owner's node replied {code}"


def _progress(coordinator: Coordinator, request: ExpertRequest) -> tuple[Progress | None, datetime | None]:
    """Return the latest progress of a request's training run, and its time."""
    path = coordinator.root / "progress" / f"{request.id}.json"
    if not path.is_file():
        return None, None
    content = read_json(path)
    seen = datetime.fromisoformat(content.pop("at"))
    return Progress.of_json(content), seen
