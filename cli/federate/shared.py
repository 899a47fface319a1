"""Output of `expertctl federate` about shared models and contributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..output import Table

if TYPE_CHECKING:
    from ...experts.federation.coordinator.round_keeper import SharedStatus


def shared_line(status: SharedStatus) -> str:
    """Return the status of a shared model as one line."""
    if status.state == "finished":
        return f"'{status.name}' is finished: generalists/{status.name}"
    until = f" until {status.deadline:%Y-%m-%d %H:%M} UTC" if status.deadline is not None else ""
    return (
        f"'{status.name}': round {status.number + 1} of {status.total}, {len(status.delivered)} of {status.owners} owners have "
        f"delivered, {status.needed} are needed{until}"
    )


def public_loss_text(losses: Mapping[str, float]) -> str:
    """Return an expert's loss on public text, and by how much it differs from the seed's."""
    expert, seed = losses["expert"], losses["seed"]
    return f"{expert:.3f} ({100 * (expert / seed - 1):+.1f}%)" if seed else f"{expert:.3f}"


def shared_table(statuses: Sequence[SharedStatus]) -> Table:
    """Return a table with a row for each shared model."""
    rows = [
        (
            status.name,
            status.recipe,
            status.state,
            f"{min(status.number + 1, status.total)} of {status.total}",
            f"{len(status.delivered)} of {status.owners}, {status.needed} needed"
            if status.deadline is not None
            else "",
            f"{status.deadline:%Y-%m-%d %H:%M}" if status.deadline is not None else "",
            ", ".join(status.missing),
        )
        for status in statuses
    ]
    return Table(("shared model", "recipe", "state", "round", "delivered", "deadline", "missing"), rows)
