"""`expertctl federate`: data owners who hand in experts and keep their text."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...core.errors import UserError
from ..context import Session, pass_session
from ..group import Group, cli_command
from ..output import Table, number
from .ask import ask
from .files import deliver, pack, work
from .options import coordinator_of, default_state, state_option
from .shared import shared_content, shared_table
from .simulate import simulate_command

if TYPE_CHECKING:
    from ...experts.federation.coordinator.owner_status import OwnerStatus

WATCH_SECONDS = 2.0
NETWORK = ("serve", "join")


class FederateGroup(Group):
    """The commands for a network stand in a file of their own, which is imported when one of them is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *NETWORK]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in NETWORK:
            return super().get_command(ctx, name)
        from . import network

        found: click.Command = getattr(network, name)
        return found


@click.group("federate", cls=FederateGroup)
def command() -> None:
    """Let data owners train experts on text that stays with them, and merge what they hand in.

    The coordinator has the workspace with the seed; each owner has a key, text, and a state folder of its own.
    """


@cli_command("keys", example="expertctl federate keys")
@state_option
@pass_session
def keys(session: Session, state: Path | None) -> None:
    """Make an owner's pair of keys; the public part goes to the coordinator.

    A pair that is there already is shown and stays.
    """
    from ...experts.federation.protocol.keys import KEY_FILE, PUBLIC_FILE, make_key, read_key

    folder = state or default_state()
    key = read_key(folder) if (folder / KEY_FILE).exists() else make_key(folder)
    content = {
        "private": str(key.path),
        "public": str(folder / PUBLIC_FILE),
        "line": key.public.line,
        "fingerprint": key.public.fingerprint,
    }
    session.finish(
        content,
        f"give this file to the coordinator: {folder / PUBLIC_FILE}",
        f"fingerprint: {key.public.fingerprint}",
    )


@cli_command("invite", example="expertctl federate invite site-a.pub --name site-a")
@click.argument("public", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--name", required=True, metavar="NAME", help="What the owner is called here.")
@pass_session
def invite(session: Session, public: Path, name: str) -> None:
    """Invite an owner by the public part of its key."""
    from ...experts.federation.protocol.keys import PublicKey

    if not public.is_file():
        raise UserError(f"{public} does not exist; the owner makes it with `expertctl federate keys`")
    member = coordinator_of(session).members.add(name, PublicKey.read(public))
    session.finish(
        {"name": member.name, "fingerprint": member.key.fingerprint},
        f"'{member.name}' is invited: {member.key.fingerprint}",
    )


@cli_command("remove", example="expertctl federate remove site-a")
@click.argument("name", metavar="NAME")
@pass_session
def remove(session: Session, name: str) -> None:
    """Take an owner out of the federation; experts that were accepted stay."""
    coordinator_of(session).members.remove(name)
    session.finish({"removed": name}, f"'{name}' is no member any more; what was accepted from it stays")


@cli_command("status", example="expertctl federate status --watch")
@click.option("--watch", is_flag=True, help="Show it again every few seconds, until Ctrl-C.")
@pass_session
def status(session: Session, watch: bool) -> None:
    """Show how every owner stands: asked, training, accepted, or refused and why."""
    from ...experts.federation.coordinator.owner_status import owner_statuses
    from ...experts.federation.coordinator.round_keeper import status_of

    coordinator = coordinator_of(session)
    while True:
        found = owner_statuses(coordinator)
        shared = [status_of(coordinator, one) for one in coordinator.shared_models().values()]
        if watch and sys.stdout.isatty():
            click.clear()
        session.finish(
            {
                "owners": [_status_content(one) for one in found],
                "shared": [shared_content(one) for one in shared],
            },
            *([shared_table(shared)] if shared else []),
            _status_table(found),
        )
        if not watch:
            return
        time.sleep(WATCH_SECONDS)


def _status_table(found: list[OwnerStatus]) -> Table | str:
    if not found:
        return "nobody is invited yet: expertctl federate invite FILE.pub --name NAME"
    rows = []
    for one in found:
        progress, training = one.progress, ""
        if one.state != "accepted" and progress is not None:
            from ...core.process.progress import duration

            training = progress.state if progress.state != "failed" else f"failed ({progress.code})"
            if progress.state == "training":
                training = f"step {number(progress.step)} of {number(progress.steps)}"
                training += f", loss {progress.loss:.2f}" if progress.loss is not None else ""
                training += (
                    f", {duration(progress.seconds_left)} left" if progress.seconds_left is not None else ""
                )
        rows.append(
            (
                one.name,
                "yes" if one.online else "",
                one.state or "invited",
                training,
                f"{one.seen:%Y-%m-%d %H:%M}" if one.seen is not None else "",
                f"{one.deadline:%Y-%m-%d %H:%M}" if one.deadline is not None else "",
                one.detail,
            )
        )
    return Table(("owner", "online", "state", "training", "last heard", "deadline", "detail"), rows)


def _status_content(one: OwnerStatus) -> dict[str, Any]:
    return {
        "owner": one.name,
        "online": one.online,
        "request": one.request,
        "state": one.state,
        "detail": one.detail,
        "progress": one.progress.as_json() if one.progress is not None else None,
        "last_heard": one.seen.isoformat() if one.seen is not None else None,
        "deadline": one.deadline.isoformat() if one.deadline is not None else None,
    }


for _one in (keys, invite, remove, ask, pack, work, deliver, status, simulate_command):
    command.add_command(_one)
