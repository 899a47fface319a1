"""`expertctl tune`: train a generalist further."""

from __future__ import annotations

from typing import Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag, name_list, option, training_settings, with_training
from ..summaries import show_artefact


@cli_command("tune", example="expertctl tune campus-tuned --from campus --trains router --domains web --tokens 500000")
@click.argument("name", metavar="NAME")
@option("--from", "GENERALIST", "Model to train: a generalist, or seed.", name="base")
@option(
    "--trains",
    "PARAMETERS",
    "Trainable parameters: router (default), mixture, another trainer of generalists, or a pattern of tensor names.",
)
@name_list("--domains", "Domains to train on, in equal shares.")
@with_training
@flag("--force", "Replace an existing generalist of that name.")
@pass_session
def command(
    session: Session,
    name: str,
    base: str | None,
    trains: str | None,
    domains: tuple[str, ...] | None,
    tokens: int | None,
    settings: dict[str, Any],
    options: dict[str, Any],
    force: bool,
) -> None:
    """Train a generalist further and save the result as NAME.

    To resume an interrupted run, give only NAME. The manifest of the new generalist records which tensors were trained
    on which text: removing an expert from a mixture later does not undo joint training.
    """
    from ...experts.runs.tuning import TuningSettings

    tuning = TuningSettings(trains, domains or (), options, training_settings(tokens, settings))
    workspace = session.open()
    with session.progress(name) as progress:
        manifest = workspace.tune(name, base, tuning, force=force, reporter=progress)
    show_artefact(session, workspace.generalists / name, manifest)
