"""`expertctl baseline`: train baselines to compare generalists with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..context import Session, pass_session
from ..group import Group
from ..options import flag, jobs, name_list
from ..summaries import show_artefact

if TYPE_CHECKING:
    from ...experts.runs.launching import JobCount


@click.group("baseline", cls=Group)
def command() -> None:
    """Train baselines to compare generalists with."""


@command.command("dense", example="expertctl baseline dense && expertctl eval forest dense")
@name_list("--experts", "Experts to match: their domains and tokens. Default: all finished experts.")
@flag("--same-batch", "Use an expert's batch size and more steps, instead of an expert's steps and a larger batch.")
@flag("--force", "Replace the existing baseline.")
@pass_session
def dense(session: Session, experts: tuple[str, ...] | None, same_batch: bool, force: bool) -> None:
    """Train one dense model for as many tokens as all experts together.

    Training starts from the seed and covers the domains of the experts.
    """
    workspace = session.open()
    with session.progress() as progress:
        manifest = workspace.baselines.dense(experts=experts, same_batch=same_batch, reporter=progress, force=force)
    show_artefact(session, workspace.layout.baselines / manifest.name, manifest)


@command.command(
    "random-split", example="expertctl baseline random-split --jobs 2 && expertctl eval forest random-split"
)
@jobs("Number of runs to train at the same time; auto: as many as fit. Default: 1, on a cluster all.")
@flag("--force", "Replace the existing baseline.")
@pass_session
def random_split(session: Session, jobs: JobCount, force: bool) -> None:
    """Train experts on random slices of all text and make their ensemble.

    Trains as many models as there are experts. The difference to the ensemble of the domain experts shows the effect
    of the domains.
    """
    workspace = session.open()
    with session.progress() as progress:
        manifest = workspace.baselines.random_split(jobs=jobs, reporter=progress, force=force)
    show_artefact(session, workspace.layout.baselines / "random-split", manifest)
