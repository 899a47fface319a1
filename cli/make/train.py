"""`expertctl train`: train experts, resuming interrupted runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..context import INTERRUPTED, Session, pass_session
from ..group import cli_command
from ..options import choice, flag, integer, option, pairs

if TYPE_CHECKING:
    from expertctl.workspace import Workspace

    from ...core.config.settings import LauncherConfig
    from ...experts.runs.launching import TrainResult


@cli_command("train", example="expertctl train --all --jobs 2")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@flag("--all", "Train all branched experts and all experts of expertctl.yaml.", name="everything")
@integer("--jobs", "Number of experts to train at the same time.", default=1)
@integer(
    "--nproc", "Processes that train each expert together (with torchrun), on a GPU each if there are GPUs. Default: 1."
)
@choice(
    "--strategy",
    ["ddp", "fsdp"],
    "How several processes hold the model: replicated, or a part of every tensor each. Default: ddp.",
)
@option("--launcher", "NAME", "Where training runs. Default: the launcher of expertctl.yaml, else local.")
@pairs("--launcher-option", "launcher_options", "Set an option of the launcher; repeatable.")
@option("--track", "NAME", "Record the runs with this experiment tracker too; repeatable.", multiple=True)
@pass_session
def command(
    session: Session,
    names: tuple[str, ...],
    everything: bool,
    jobs: int,
    nproc: int | None,
    strategy: str | None,
    launcher: str | None,
    launcher_options: dict[str, Any],
    track: tuple[str, ...],
) -> int:
    """Train experts, resuming interrupted runs.

    If an expert fails, the others continue; the error is shown at the end and the exit status is 1. Ctrl-C saves a
    checkpoint of every run.
    """
    if bool(names) == everything:
        raise click.UsageError("name the experts to train, or give --all")
    workspace = session.open()
    given = {"nproc": nproc, "strategy": strategy}
    launcher_options = {**launcher_options, **{name: value for name, value in given.items() if value is not None}}
    expert_names = tuple(dict.fromkeys(names)) or workspace.experts.names()
    with session.progress(*expert_names) as progress:
        result = workspace.train(
            *expert_names,
            jobs=jobs,
            launcher=_launcher(workspace, launcher, launcher_options),
            track=track,
            reporter=progress,
        )
    session.finish(
        {"finished": list(result.finished), "failed": dict(result.failed), "interrupted": list(result.interrupted)},
        *([f"finished: {', '.join(result.finished)}"] if result.finished else []),
    )
    return _report(result)


def _launcher(workspace: Workspace, name: str | None, options: dict[str, Any]) -> LauncherConfig | None:
    """Return the launcher of the command line; the project's options apply only to the project's launcher."""
    from ...core.config.settings import LauncherConfig

    if name is None and not options:
        return None
    declared = workspace.config.launcher
    base = declared if name in (None, declared.name) else LauncherConfig(name=name or declared.name)
    return base.model_copy(update={"options": {**base.options, **options}})


def _report(result: TrainResult) -> int:
    """Print a line for each unfinished run and return the exit status."""
    for name, error in result.failed.items():
        click.echo(f"Error: {name}: {error}", err=True)
    if result.interrupted:
        stopped = ", ".join(result.interrupted)
        click.echo(f"Error: interrupted, state saved: {stopped}; rerun the same command to resume", err=True)
        return INTERRUPTED
    return 1 if result.failed else 0
