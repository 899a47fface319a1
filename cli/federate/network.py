"""`expertctl federate serve` and `join`: a federation over a network."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...core.errors import UserError
from ..context import Session, pass_session
from ..group import cli_command
from .options import coordinator_of, owner_from, with_owner
from .review import agree

if TYPE_CHECKING:
    from ...experts.federation.owner.owner import Owner, Review
    from ...plugins.flower.coordinator.serving import Listening
    from ...plugins.flower.owner.owner_work import Agree


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C and SIGTERM set."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {one: signal.signal(one, lambda *_: stop.set()) for one in signals}
    try:
        yield stop
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


@cli_command("serve", example="expertctl federate serve --listen 0.0.0.0:8443 --name hub.example.org")
@click.option(
    "--listen",
    default="0.0.0.0:8443",
    show_default=True,
    metavar="HOST:PORT",
    help="Where owners reach this coordinator.",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="A name or address that owners use for it, where it differs from this machine's own.",
)
@pass_session
def serve(session: Session, listen: str, names: tuple[str, ...]) -> None:
    """Let owners join over a network, until Ctrl-C.

    Makes an authority and a server certificate on first use; owners need its file ca.crt. What was asked and what has arrived
    is on disk: stopped or killed at any point, the same command goes on, and owners come back by themselves.
    """
    from ...plugins.flower.coordinator.serving import serve as run

    def opened(listening: Listening) -> None:
        certificates = listening.certificates
        session.finish(
            {
                "listen": f"{listening.host}:{listening.port}",
                "ca": str(certificates.authority),
                "fingerprint": certificates.fingerprint,
            },
            f"listening on {listening.host}:{listening.port}",
            f"owners need this file: {certificates.authority}",
            f"its fingerprint (sha256): {certificates.fingerprint}",
        )
        sys.stdout.flush()

    coordinator = coordinator_of(session)
    with stopped_by_signals() as stop:
        run(coordinator, listen, names, tell=session.note, opened=opened, stop=stop)


@cli_command(
    "join",
    example="expertctl federate join --server hub.example.org:8443 --ca ca.crt --data ./private --name site-a",
)
@click.option("--server", required=True, metavar="HOST:PORT", help="The coordinator.")
@click.option(
    "--ca",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The coordinator's ca.crt; compare its fingerprint on another way.",
)
@with_owner
@click.option("--name", metavar="NAME", help="What the coordinator calls you; checked.")
@click.option("--review", is_flag=True, help="Show every tensor that would leave, then ask.")
@click.option("--yes", is_flag=True, help="Let experts leave without asking.")
@click.option("--once", is_flag=True, help="End when all that was asked is delivered or refused.")
@pass_session
def join(
    session: Session,
    /,
    server: str,
    ca: Path,
    name: str | None,
    review: bool,
    yes: bool,
    once: bool,
    **owner_options: Any,
) -> None:
    """Be a data owner of a federation, until Ctrl-C.

    Takes requests, trains next to your text, delivers experts. Training runs in a process of its own and goes on when this
    command ends. Before an expert leaves you are shown what it is, and asked, unless --yes.
    """
    from ...plugins.flower.owner.joining import join as run

    owner = owner_from(**owner_options)
    with stopped_by_signals() as stop:
        run(
            owner,
            server,
            ca,
            name=name,
            agree=_agreement(session, review=review, yes=yes),
            tell=session.note,
            stop=stop,
            until_done=once,
        )
    session.finish(
        {"outcomes": _outcomes(owner)}, *(f"{one}: {what}" for one, what in _outcomes(owner).items())
    )


def _agreement(session: Session, *, review: bool, yes: bool) -> Agree:
    """Return what asks the owner; where there is nobody to ask, an expert waits."""
    answers: dict[str, bool] = {}

    def ask_owner(found: Review) -> bool:
        identifier = found.request.id
        if identifier not in answers:
            answers[identifier] = True
            try:
                with _interruptible():
                    agree(session, found, whole=review, yes=yes)
            except UserError as error:  # the owner said no, or nobody is there to ask
                answers[identifier] = False
                session.note(str(error))
        return answers[identifier]

    return ask_owner


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the wait for an answer."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _outcomes(owner: Owner) -> dict[str, str]:
    found = {request.id: owner.outcome(request.id) for request in owner.requests()}
    return {identifier: outcome for identifier, outcome in found.items() if outcome is not None}
