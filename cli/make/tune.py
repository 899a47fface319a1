"""`expertctl tune`: train a generalist further."""

from __future__ import annotations

from typing import Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..output import short
from ..parsing import as_dictionary, names, setting


@cli_command("tune", example="expertctl tune campus-tuned --from campus --trains router --domains web --tokens 500000")
@click.argument("name", metavar="NAME")
@click.option("--from", "base", metavar="GENERALIST", help="Model to train: a generalist, or seed.")
@click.option(
    "--trains",
    metavar="PART",
    help="Trainable parameters: router (default), mixture, another trainer of generalists, or a pattern of tensor names.",
)
@click.option("--domains", type=names, metavar="A,B", help="Domains to train on, in equal shares.")
@click.option("--tokens", type=int, metavar="N", help="Training budget in tokens.")
@click.option(
    "--set",
    "settings",
    type=setting,
    multiple=True,
    metavar="KEY=VALUE",
    help="Set another training setting; repeatable.",
)
@click.option(
    "--option",
    "options",
    type=setting,
    multiple=True,
    metavar="KEY=VALUE",
    help="Set an option of the trainer; repeatable.",
)
@click.option("--force", is_flag=True, help="Replace an existing generalist of that name.")
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
    """Train a generalist further and save the result as NAME.

    To resume an interrupted run, give only NAME. The manifest of the new generalist records which tensors were trained
    on which text: removing an expert from a mixture later does not undo joint training.
    """
    from ...experts.runs.tuning import TuningSettings

    training = as_dictionary([*settings, *([("tokens", tokens)] if tokens is not None else [])])
    workspace = session.open()
    with session.progress(name) as progress:
        manifest = workspace.tune(
            name,
            base,
            TuningSettings(trains, domains or (), as_dictionary(options), training),
            force=force,
            reporter=progress,
        )
    from ..summaries import artefact_content

    folder = workspace.generalists / name
    session.finish(
        artefact_content(folder, manifest),
        f"generalist '{name}' {short(manifest.digest)} is in {folder}",
    )
