"""How every owner of a federation stands, from what the coordinator has on disk."""

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
    """How one owner stands with one request, or with none."""

    name: str
    online: bool
    seen: datetime | None
    """When the owner was last heard of."""
    request: str | None = None
    state: State | None = None
    detail: str = ""
    progress: Progress | None = None
    deadline: datetime | None = None


def owner_statuses(coordinator: Coordinator) -> list[OwnerStatus]:
    """Return how every member stands: a line for each request, without rounds that are over, and one for whoever has none."""
    heard, now = coordinator.presence.heard(), coordinator.now()
    found = []
    for member in coordinator.members.all():
        entries = coordinator.ledger.states_of(member.name)
        current = without_superseded([coordinator.request(one) for one in entries])
        known = {request.id: _progress(coordinator, request) for request in current}
        times = [at for _, at in known.values() if at is not None]
        seen = max([*times, *([heard[member.name]] if member.name in heard else [])], default=None)
        online = member.name in heard and now - heard[member.name] <= ONLINE_WITHIN
        if not current:
            found.append(OwnerStatus(member.name, online, seen))
        for request in current:
            entry = entries[request.id]
            found.append(
                OwnerStatus(
                    member.name,
                    online,
                    seen,
                    request.id,
                    entry.state,
                    _detail(coordinator, entry, request),
                    known[request.id][0],
                    request.deadline,
                )
            )
    return found


def _detail(coordinator: Coordinator, entry: Entry, request: ExpertRequest) -> str:
    if entry.state != "asked":
        return entry.detail
    if request.deadline <= coordinator.now():
        return "the deadline has passed"
    return _not_taken(coordinator, request) or str(request.recipe.round or "")


def _not_taken(coordinator: Coordinator, request: ExpertRequest) -> str:
    """Return what an owner's machine answered if it did not take a request."""
    path = coordinator.root / "handed" / f"{request.id}.json"
    code = read_json(path)["code"] if path.is_file() else "TAKEN"
    return "" if code == "TAKEN" else f"the owner's machine answered {code}"


def _progress(coordinator: Coordinator, request: ExpertRequest) -> tuple[Progress | None, datetime | None]:
    """Return the last that an owner said of a training, and when."""
    path = coordinator.root / "progress" / f"{request.id}.json"
    if not path.is_file():
        return None, None
    content = read_json(path)
    seen = datetime.fromisoformat(content.pop("at"))
    return Progress.of_json(content), seen
