"""`expertctl federate serve` and `join`: a federation over a network."""

from __future__ import annotations

import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...core.errors import UserError
from ...core.reporting import Reporter
from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag, integer, option
from .options import coordinator_of, handled_signals, owner_from, stopped_by_signals, with_owner
from .review import require_consent

if TYPE_CHECKING:
    from ...experts.federation.owner.owner import Review
    from ...plugins.flower.owner.owner_work import Consent
    from ...plugins.flower.protocol.certificates import Certificates


PATIENCE_S = 10.0
"""Seconds after a signal in which `join` ends what it is doing; a coordinator that does not answer cannot hold it longer."""


class _Notes(Reporter):
    """Prints messages only, since a progress display would disturb the question for consent."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def say(self, line: str) -> None:
        self._session.note(line)


@cli_command("serve", example="expertctl federate serve --listen 0.0.0.0:8443 --name hub.example.org")
@option("--listen", "HOST:PORT", "Address to listen on.", default="0.0.0.0:8443")
@option(
    "--name",
    "NAME",
    "Further host name or address of this coordinator for its certificate.",
    name="names",
    multiple=True,
)
@option("--status", "HOST:PORT", "Serve a status page and metrics for Prometheus; an address of this machine only.")
@integer("--certificate-days", "Days for which new certificates are valid.", metavar="N", default=3650)
@pass_session
def serve(session: Session, listen: str, names: tuple[str, ...], status: str | None, certificate_days: int) -> None:
    """Serve a federation over a network, until Ctrl-C.

    Creates a certificate authority and a server certificate on first use; owners need the file ca.crt. All state is on disk.
    If interrupted or killed, run the same command again to resume; owners reconnect automatically.
    """
    from ...plugins.flower.processes.child import require_flower

    require_flower()
    from ...plugins.flower.coordinator.serving import serve as run

    def report_opened(address: str, certificates: Certificates) -> None:
        authority_until, server_until = certificates.valid_until()
        session.finish(
            {
                "listen": address,
                "ca": str(certificates.authority),
                "fingerprint": certificates.fingerprint,
                "authority_valid_until": authority_until,
                "certificate_valid_until": server_until,
            },
            f"listening on {address}",
            f"owners need this file: {certificates.authority}",
            f"its fingerprint (sha256): {certificates.fingerprint}",
            f"it is valid until {authority_until:%Y-%m-%d}; the server's own certificate until {server_until:%Y-%m-%d}, and is "
            "renewed before that",
        )
        sys.stdout.flush()

    coordinator = coordinator_of(session)
    with stopped_by_signals() as stop:
        run(
            coordinator,
            listen,
            names,
            reporter=_Notes(session),
            opened=report_opened,
            stop=stop,
            status=status,
            lifetime=timedelta(days=certificate_days),
        )


@cli_command(
    "join", example="expertctl federate join --server hub.example.org:8443 --ca ca.crt --data ./private --name site-a"
)
@option("--server", "HOST:PORT", "Address of the coordinator.", required=True)
@option(
    "--ca",
    "FILE",
    "The coordinator's ca.crt; verify its fingerprint over another channel.",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
)
@with_owner
@option("--name", "NAME", "Your name at the coordinator; an error if it differs.")
@flag("--review", "List every tensor of a delivery, then ask.")
@flag("--yes", "Send deliveries without asking.")
@flag("--once", "Exit when every request is delivered or refused.")
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
    """Take part in a federation as a data owner, until Ctrl-C.

    Receives requests, trains on your text and delivers experts. Training runs in a separate process and continues when this
    command ends. Before a delivery is sent, its content is shown and you are asked for your consent, unless --yes is given.
    """
    from ...plugins.flower.processes.child import require_flower

    require_flower()
    from ...plugins.flower.owner.joining import join as run

    owner = owner_from(**owner_options)
    with stopped_by_signals(PATIENCE_S) as stop:
        run(
            owner,
            server,
            ca,
            name=name,
            consent=_consent(session, review=review, yes=yes),
            reporter=_Notes(session),
            stop=stop,
            until_done=once,
        )
    outcomes = {request.id: outcome for request in owner.requests() if (outcome := owner.outcome(request)) is not None}
    session.finish({"outcomes": outcomes}, *(f"{identifier}: {outcome}" for identifier, outcome in outcomes.items()))


def _consent(session: Session, *, review: bool, yes: bool) -> Consent:
    """Return a function that asks the owner once per request; without a terminal the delivery waits."""
    answers: dict[str, bool] = {}

    def ask_owner(delivery: Review) -> bool:
        identifier = delivery.request.id
        if identifier not in answers:
            answers[identifier] = True
            try:
                with handled_signals(signal.default_int_handler, signal.SIGINT):  # Ctrl-C interrupts the question
                    require_consent(session, delivery, full=review, yes=yes)
            except UserError as error:  # the owner declined, or there is no terminal
                answers[identifier] = False
                session.note(str(error))
        return answers[identifier]

    return ask_owner
