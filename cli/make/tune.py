"""`expertctl tune`: train a generalist further."""

from __future__ import annotations

from typing import Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..output import short
from ..parsing import as_dictionary, names, setting


@cli_command(
    "tune", example="expertctl tune campus-tuned --from campus --trains router --domains web --tokens 500000"
)
@click.argument("name", metavar="NAME")
@click.option("--from", "base", metavar="GENERALIST", help="What it is trained from: a generalist, or seed.")
@click.option(
    "--trains",
    metavar="PART",
    help="What of it trains: router (default), mixture, another trainer of generalists, or a pattern of tensor names.",
)
@click.option(
    "--domains", type=names, metavar="A,B", help="The text to train on, each giving the same share."
)
@click.option("--tokens", type=int, metavar="N", help="Training budget in tokens.")
@click.option(
    "--set", "settings", type=setting, multiple=True, metavar="KEY=VALUE", help="Any other training setting."
)
@click.option(
    "--option", "options", type=setting, multiple=True, metavar="KEY=VALUE", help="An option of the trainer."
)
@click.option("--force", is_flag=True, help="Replace a generalist of that name.")
@pass_session
def command(
    session: Session,
    name: str,
    base: str | None,
    trains: str | None,
    domains: tuple[str, ...] | None,
    tokens: int | None,
    settings: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
    force: bool,
) -> None:
    """Train a generalist further, into a new one called NAME.

    A tuning that was interrupted goes on with the name alone. What has seen the text is noted in the new generalist's
    manifest: an expert that leaves a mixture later has left its traces in what was trained jointly with it.
    """
    training = as_dictionary([*settings, *([("tokens", tokens)] if tokens is not None else [])])
    workspace = session.open()
    with session.runs([name]) as progress:
        manifest = workspace.tune(
            name,
            base,
            trains=trains,
            domains=domains or (),
            options=as_dictionary(options),
            training=training,
            force=force,
            reporter=progress,
        )
    from ..summaries import artefact_content

    folder = workspace.generalists / name
    session.finish(
        artefact_content(folder, manifest),
        f"generalist '{name}' {short(manifest.digest)} is in {folder}",
    )
