"""`expertctl baseline`: what the experts' generalists are measured against."""

from __future__ import annotations

import click

from .context import Session, pass_session
from .group import Group, cli_command


@click.group("baseline", cls=Group)
def command() -> None:
    """Train what generalists are compared with."""


@cli_command("dense", example="expertctl baseline dense && expertctl eval forest dense")
@click.option("--force", is_flag=True, help="Make it again.")
@pass_session
def dense(session: Session, force: bool) -> None:
    """Train one dense model on all domains for as many tokens as all experts together."""
    workspace = session.open()
    with session.runs(["dense"]) as progress:
        manifest = workspace.dense_baseline(reporter=progress, force=force)
    from .summaries import artefact_content, made

    folder = workspace.layout.baselines / "dense"
    session.finish(artefact_content(folder, manifest), made(folder, manifest))


@cli_command(
    "random-split", example="expertctl baseline random-split --jobs 2 && expertctl eval forest random-split"
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="How many runs at a time.",
)
@click.option("--force", is_flag=True, help="Make them again.")
@pass_session
def random_split(session: Session, jobs: int, force: bool) -> None:
    """Train as many experts on random slices of all text, and make their ensemble."""
    workspace = session.open()
    with session.runs(()) as progress:
        manifest = workspace.random_split_baseline(jobs=jobs, reporter=progress, force=force)
    from .summaries import artefact_content, made

    folder = workspace.layout.baselines / "random-split"
    session.finish(artefact_content(folder, manifest), made(folder, manifest))


command.add_command(dense)
command.add_command(random_split)
