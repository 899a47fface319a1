"""`expertctl federate`: data owners deliver experts and keep their text."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ...core.errors import UserError
from ..context import Session, pass_session
from ..group import Group, cli_command
from ..options import flag, option
from ..output import Table, number
from .ask import ask
from .files import deliver, pack, work
from .keys import accept_key, keys, rotate_key
from .network import join, serve
from .options import coordinator_of, default_state, state_option
from .shared import public_loss_text, shared_table
from .simulate import simulate_command

if TYPE_CHECKING:
    from ...experts.federation.coordinator.owner_status import OwnerStatus

WATCH_SECONDS = 2.0


@click.group("federate", cls=Group)
def command() -> None:
    """Let data owners train experts on text that stays with them, and merge the experts.

    The coordinator has the workspace with the seed; each owner has a key, text and a state folder.
    """


@cli_command("invite", example="expertctl federate invite site-a.pub --name site-a")
@click.argument("public", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@option("--name", "NAME", "Name of the owner in this federation.", required=True)
@pass_session
def invite(session: Session, public: Path, name: str) -> None:
    """Invite an owner by its public key."""
    from ...experts.federation.protocol.keys import PublicKey

    if not public.is_file():
        raise UserError(f"{public} does not exist; the owner makes it with `expertctl federate keys`")
    member = coordinator_of(session).invite(name, PublicKey.read(public))
    session.finish(
        {"name": member.name, "fingerprint": member.key.fingerprint},
        f"'{member.name}' is invited: {member.key.fingerprint}",
    )


@cli_command("remove", example="expertctl federate remove site-a")
@click.argument("name", metavar="NAME")
@pass_session
def remove(session: Session, name: str) -> None:
    """Remove an owner from the federation; its accepted experts stay."""
    coordinator_of(session).remove(name)
    session.finish({"removed": name}, f"'{name}' is removed; its accepted experts stay")


@cli_command("stop", example="expertctl federate stop site-a")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@pass_session
def stop(session: Session, names: tuple[str, ...]) -> None:
    """Withdraw the open requests of owners.

    Training for them ends when the owners are next online. Accepted experts stay; `ask` makes new requests.
    """
    coordinator = coordinator_of(session)
    for name in names:
        coordinator.files.members.get(name)
    withdrawn = [request for name in names for request in coordinator.withdraw(name)]
    session.finish(
        {"withdrawn": [{"request": request.id, "owner": request.owner} for request in withdrawn]},
        *(f"request {request.id} to '{request.owner}' is withdrawn" for request in withdrawn),
    )


@cli_command("decline", example="expertctl federate decline 0123456789abcdef")
@click.argument("identifier", metavar="REQUEST")
@state_option
@pass_session
def decline(session: Session, identifier: str, state: Path | None) -> None:
    """Decline a request as its owner; training for it ends.

    The coordinator is told by a running `join`, or by the next one.
    """
    from ...experts.federation.owner.owner import Owner

    owner = Owner((state or default_state()).expanduser().resolve())
    request = owner.request(identifier)
    if owner.outcome(request) == "accepted":
        raise UserError(f"the expert of request {identifier} is accepted already; ask the coordinator to remove it")
    owner.close(request, "DECLINED")
    session.finish({"declined": identifier}, f"request {identifier} is declined")


@cli_command("audit", example="expertctl federate audit --known DIGEST")
@option("--known", "DIGEST", "Digest of a line that an earlier audit printed and that has to be there.")
@pass_session
def audit(session: Session, known: str | None) -> int:
    """Check the ledger's signatures and show what it records.

    Every line is signed, and names the digest of the line before it. The exit status is 1 if a line was changed, added or
    removed. Keep the printed digest elsewhere: it shows later whether lines were removed from the end.
    """
    ledger = coordinator_of(session).files.ledger
    result = ledger.chain.audit(known)
    entries = ledger.entries()
    rows = [(entry.at, entry.state, entry.owner, entry.request, entry.detail) for entry in entries]
    session.finish(
        {
            **asdict(result),
            "entries": list(map(asdict, entries)),
            "removed": list(map(asdict, ledger.removed_members())),
        },
        Table(("time", "event", "owner", "request", "detail"), rows),
        *result.problems,
        f"{number(result.lines)} lines; digest of the last: {result.digest}",
    )
    return 1 if result.problems else 0


@cli_command("status", example="expertctl federate status --watch")
@flag("--watch", "Refresh every few seconds, until Ctrl-C.")
@pass_session
def status(session: Session, watch: bool) -> None:
    """Show the status of every owner and shared model."""
    from ...experts.federation.coordinator.report import FederationReport

    coordinator = coordinator_of(session)
    while True:
        report = FederationReport.of(coordinator)
        if watch and sys.stdout.isatty():
            click.clear()
        session.finish(
            report.as_json(),
            *([shared_table(report.shared)] if report.shared else []),
            _status_table(report.owners),
        )
        if not watch:
            return
        time.sleep(WATCH_SECONDS)


def _status_table(statuses: Sequence[OwnerStatus]) -> Table | str:
    if not statuses:
        return "no owner is invited yet: expertctl federate invite FILE.pub --name NAME"
    rows = []
    for status in statuses:
        progress, training = status.progress, ""
        if status.state != "accepted" and progress is not None:
            from ...core.process.progress import duration

            training = progress.state if progress.state != "failed" else f"failed ({progress.code})"
            if progress.state == "training":
                training = f"step {number(progress.step)} of {number(progress.steps)}"
                training += f", loss {progress.loss:.2f}" if progress.loss is not None else ""
                training += f", {duration(progress.seconds_left)} left" if progress.seconds_left is not None else ""
        rows.append(
            (
                status.owner,
                "yes" if status.online else "",
                status.state or "invited",
                training,
                f"{status.last_heard:%Y-%m-%d %H:%M}" if status.last_heard is not None else "",
                f"{status.deadline:%Y-%m-%d %H:%M}" if status.deadline is not None else "",
                status.detail,
                public_loss_text(status.public_loss) if status.public_loss is not None else "",
            )
        )
    return Table(("owner", "online", "state", "training", "last heard", "deadline", "detail", "public text"), rows)


for _command in (
    keys,
    rotate_key,
    accept_key,
    invite,
    remove,
    ask,
    stop,
    pack,
    work,
    decline,
    deliver,
    status,
    audit,
    simulate_command,
    serve,
    join,
):
    command.add_command(_command)
