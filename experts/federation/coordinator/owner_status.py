"""Status of every owner of a federation, from the coordinator's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from ..protocol.requests import ExpertRequest, Progress, without_superseded
from .coordinator import Coordinator
from .ledger import State
from .members import ONLINE_WITHIN


@dataclass(frozen=True)
class OwnerStatus:
    """Status of one owner and one of its requests, if it has any; the output of `federate status --json`."""

    owner: str
    online: bool
    request: str | None = None
    """Identifier of the request; None without one, as are state, progress and deadline."""
    state: State | None = None
    detail: str = ""
    progress: Progress | None = None
    last_heard: datetime | None = None
    """When the owner was last heard from; None if never."""
    deadline: datetime | None = None
    public_loss: Mapping[str, float] | None = None
    """Losses of the accepted expert and its seed on public text, as in the ledger."""


def owner_statuses(coordinator: Coordinator) -> list[OwnerStatus]:
    """Return the status of every member: one entry for each current request, or one for a member without requests."""
    files, now = coordinator.files, coordinator.now()
    heard = files.presence.heard()
    statuses = []
    for member in files.members.all():
        entries = files.ledger.states_of(member.name)
        requests = without_superseded([files.request(identifier) for identifier in entries])
        progress = {request.id: files.progress(request.id) for request in requests}
        heard_at = heard.get(member.name)
        last_heard = max(filter(None, [heard_at, *(at for _, at in progress.values())]), default=None)
        online = heard_at is not None and now - heard_at <= ONLINE_WITHIN
        if not requests:
            statuses.append(OwnerStatus(member.name, online, last_heard=last_heard))
        for request in requests:
            entry = entries[request.id]
            detail = entry.detail if entry.state != "asked" else _open_detail(coordinator, request)
            training, _ = progress[request.id]
            status = (request.id, entry.state, detail, training, last_heard, request.deadline, entry.public_loss)
            statuses.append(OwnerStatus(member.name, online, *status))
    return statuses


def _open_detail(coordinator: Coordinator, request: ExpertRequest) -> str:
    if request.deadline <= coordinator.now():
        return "the deadline has passed"
    code = coordinator.files.handout(request.id)
    return f"the owner's node replied {code}" if code != "TAKEN" else str(request.recipe.round or "")
