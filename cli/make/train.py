"""`expertctl train`: train experts, going on where an earlier try stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..context import Session, pass_session
from ..group import cli_command

if TYPE_CHECKING:
    from expertctl.workspace import TrainResult

INTERRUPTED = 130


@cli_command("train", example="expertctl train --all --jobs 2")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option(
    "--all", "everything", is_flag=True, help="Train every expert that was branched or is in expertctl.yaml."
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="How many at a time.",
)
@click.option(
    "--launcher", metavar="NAME", help="Where they train. Default: what expertctl.yaml says, else local."
)
@pass_session
def command(
    session: Session, names: tuple[str, ...], everything: bool, jobs: int, launcher: str | None
) -> int:
    """Train experts, or go on where an earlier try stopped.

    An expert that fails does not touch the others; its error is shown at the end and the exit status is 1.
    Ctrl-C saves the state of all of them.
    """
    if bool(names) == everything:
        raise click.UsageError("name the experts to train, or give --all")
    workspace = session.open()
    wanted = tuple(dict.fromkeys(names)) or workspace.expert_names()
    with session.runs(wanted) as progress:
        result = workspace.train(*wanted, jobs=jobs, launcher=launcher, reporter=progress)
    session.finish(
        {
            "finished": list(result.finished),
            "failed": dict(result.failed),
            "interrupted": list(result.interrupted),
        },
        *([f"finished: {', '.join(result.finished)}"] if result.finished else []),
    )
    return _report(result)


def _report(result: TrainResult) -> int:
    """Print a line for each run that did not finish and return the exit status."""
    for name, error in result.failed.items():
        click.echo(f"Error: {name}: {error}", err=True)
    if result.interrupted:
        stopped = ", ".join(result.interrupted)
        click.echo(f"Error: interrupted, state saved: {stopped}; the same command goes on", err=True)
        return INTERRUPTED
    return 1 if result.failed else 0
