"""What the commands of `expertctl federate` say of shared models."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..output import Table

if TYPE_CHECKING:
    from ...experts.federation.coordinator.round_keeper import SharedStatus


def shared_line(found: SharedStatus) -> str:
    """Return how a shared model stands, in a line."""
    if found.state == "finished":
        return f"'{found.name}' is finished: generalists/{found.name}"
    until = f" until {found.deadline:%Y-%m-%d %H:%M} UTC" if found.deadline is not None else ""
    return (
        f"'{found.name}': round {found.number + 1} of {found.total}, {len(found.delivered)} of {found.owners} owners have "
        f"delivered, {found.needed} are needed{until}"
    )


def shared_table(found: list[SharedStatus]) -> Table:
    """Return how shared models stand, a row each."""
    rows = [
        (
            one.name,
            one.recipe,
            one.state,
            f"{min(one.number + 1, one.total)} of {one.total}",
            f"{len(one.delivered)} of {one.owners}, {one.needed} needed" if one.deadline is not None else "",
            f"{one.deadline:%Y-%m-%d %H:%M}" if one.deadline is not None else "",
            ", ".join(one.missing),
        )
        for one in found
    ]
    return Table(("shared model", "recipe", "state", "round", "delivered", "deadline", "missing"), rows)


def shared_content(found: SharedStatus) -> dict[str, Any]:
    """Return how a shared model stands, as `--json` says it."""
    deadline = found.deadline.isoformat() if found.deadline is not None else None
    return {**asdict(found), "deadline": deadline}
