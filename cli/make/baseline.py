"""`expertctl baseline`: what the experts' generalists are measured against."""

from __future__ import annotations

import click

from ..context import Session, pass_session
from ..group import Group, cli_command


@click.group("baseline", cls=Group)
def command() -> None:
    """Train what generalists are compared with."""


@cli_command("dense", example="expertctl baseline dense && expertctl eval forest dense")
@click.option(
    "--same-batch",
    is_flag=True,
    help="Take an expert's batch and more steps, instead of its steps and a larger batch.",
)
@click.option("--force", is_flag=True, help="Make it again.")
@pass_session
def dense(session: Session, same_batch: bool, force: bool) -> None:
    """Train one dense model for as many tokens as all experts.

    It goes on from the seed, on all domains of the experts.
    """
    workspace = session.open()
    with session.runs(()) as progress:
        manifest = workspace.dense_baseline(same_batch=same_batch, reporter=progress, force=force)
    from ..summaries import artefact_content, made

    folder = workspace.layout.baselines / manifest.name
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
    """Train experts on random slices of all text; make their ensemble.

    As many as there are experts. What the ensemble of the domains' experts is better by is owed to the domains.
    """
    workspace = session.open()
    with session.runs(()) as progress:
        manifest = workspace.random_split_baseline(jobs=jobs, reporter=progress, force=force)
    from ..summaries import artefact_content, made

    folder = workspace.layout.baselines / "random-split"
    session.finish(artefact_content(folder, manifest), made(folder, manifest))


command.add_command(dense)
command.add_command(random_split)
