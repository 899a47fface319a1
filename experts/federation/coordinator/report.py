"""Report on a federation for people and for monitoring: owners, shared models and members that left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .coordinator import Coordinator
from .ledger import Entry
from .owner_status import OwnerStatus, owner_statuses
from .round_keeper import SharedStatus, status_of


@dataclass(frozen=True)
class FederationReport:
    """What a coordinator's files say now."""

    owners: tuple[OwnerStatus, ...]
    shared: tuple[SharedStatus, ...]
    removed: tuple[Entry, ...]
    """Ledger entries of members that were removed."""
    events: tuple[tuple[str, int], ...]
    """Number of ledger entries of each kind."""

    @classmethod
    def of(cls, coordinator: Coordinator) -> FederationReport:
        ledger = coordinator.files.ledger
        return cls(
            tuple(owner_statuses(coordinator)),
            tuple(status_of(coordinator, model) for model in coordinator.shared_models().values()),
            tuple(ledger.removed_members()),
            tuple(sorted(Counter(entry.state for entry in ledger.entries()).items())),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the output of `federate status --json`."""
        removed = [{"owner": entry.owner, "fingerprint": entry.detail, "at": entry.at} for entry in self.removed]
        return {"owners": list(map(asdict, self.owners)), "shared": list(map(asdict, self.shared)), "removed": removed}

    def metrics(self) -> str:
        """Return the figures in Prometheus's text format."""
        return "".join(f"{line}\n" for line in self._metric_lines())

    def _metric_lines(self) -> Iterator[str]:
        members = {status.owner: status for status in self.owners}
        states = Counter(status.state or "none" for status in self.owners)
        training = [status for status in self.owners if status.progress is not None]
        yield from _gauge("members", "Invited owners.", [("", len(members))])
        yield from _gauge(
            "members_online", "Owners heard from lately.", [("", sum(s.online for s in members.values()))]
        )
        yield from _gauge(
            "requests", "Current requests by state.", [(f'state="{state}"', count) for state, count in states.items()]
        )
        yield from _gauge(
            "training_steps",
            "Optimiser steps done for a request.",
            [
                (f'owner="{status.owner}",request="{status.request}"', status.progress.step)
                for status in training
                if status.progress is not None
            ],
        )
        yield from _gauge(
            "rounds_closed", "Closed rounds of a shared model.", [(f'model="{s.name}"', s.number) for s in self.shared]
        )
        name = "expertctl_federation_events_total"
        yield f"# HELP {name} Entries of the ledger by kind."
        yield f"# TYPE {name} counter"
        for state, count in self.events:
            yield f'{name}{{event="{state}"}} {count}'


def _gauge(name: str, text: str, values: list[tuple[str, int]]) -> Iterator[str]:
    """Yield the lines of a gauge; labels hold names and identifiers, which need no escapes."""
    yield f"# HELP expertctl_federation_{name} {text}"
    yield f"# TYPE expertctl_federation_{name} gauge"
    for labels, value in values:
        yield f"expertctl_federation_{name}{f'{{{labels}}}' if labels else ''} {value}"
