"""`expertctl train`: train experts, resuming interrupted runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..context import INTERRUPTED, Session, pass_session
from ..group import cli_command
from ..options import choice, flag, integer, jobs, option, pairs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...core.config.settings import LauncherConfig
    from ...experts.runs.launching import JobCount, TrainResult


@cli_command("train", example="expertctl train --all --jobs 2")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@flag("--all", "Train all branched experts and all experts of expertctl.yaml.", name="everything")
@jobs("Number of experts to train at the same time; auto: as many as fit. Default: 1, on a cluster all.")
@integer(
    "--nproc", "Processes that train each expert together (with torchrun), on a GPU each if there are GPUs. Default: 1."
)
@choice(
    "--strategy",
    ["ddp", "fsdp", "hsdp", "ep"],
    "How several processes hold the model: the whole of it each (ddp, default), in parts (fsdp), in parts on each node (hsdp), "
    "or in parts with some experts of a mixture each (ep).",
)
@option("--launcher", "NAME", "Where training runs. Default: the launcher of expertctl.yaml, else local.")
@pairs("--launcher-option", "launcher_options", "Set an option of the launcher; repeatable.")
@flag("--detach", "Submit jobs to the queue of a cluster and return; the same command without it follows them.")
@option("--track", "NAME", "Record the runs with this experiment tracker too; repeatable.", multiple=True)
@pass_session
def command(
    session: Session,
    names: tuple[str, ...],
    everything: bool,
    jobs: JobCount,
    nproc: int | None,
    strategy: str | None,
    launcher: str | None,
    launcher_options: dict[str, Any],
    detach: bool,
    track: tuple[str, ...],
) -> int:
    """Train experts, resuming interrupted runs.

    If an expert fails, the others continue; the error is shown at the end and the exit status is 1. Ctrl-C saves a
    checkpoint of every run, and ends the jobs of a cluster.
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
            launcher=_launcher(launcher, launcher_options),
            detach=detach,
            track=track,
            reporter=progress,
        )
    content = {
        "finished": list(result.finished),
        "failed": dict(result.failed),
        "interrupted": list(result.interrupted),
    }
    if detach:
        content |= {"submitted": dict(result.submitted), "waiting": list(result.waiting)}
    session.finish(content, *_lines(result))
    return _report(result)


def _launcher(name: str | None, options: dict[str, Any]) -> LauncherConfig | None:
    """Return the launcher of the command line; options without a name are added to the project's or the expert's."""
    from ...core.config.settings import LauncherConfig

    if name is None:
        return LauncherConfig(options=options) if options else None
    return LauncherConfig(name=name, options=options)


def _lines(result: TrainResult) -> Iterator[str]:
    if result.finished:
        yield f"finished: {', '.join(result.finished)}"
    if result.submitted:
        jobs = ", ".join(f"{name} (job {job})" for name, job in result.submitted.items())
        yield f"submitted: {jobs}; follow them with: expertctl train {' '.join(result.submitted)}"
    if result.waiting:
        yield f"not submitted yet: {', '.join(result.waiting)}; run the same command again later"


def _report(result: TrainResult) -> int:
    """Print a line for each unfinished run and return the exit status."""
    for name, error in result.failed.items():
        click.echo(f"Error: {name}: {error}", err=True)
    if result.interrupted:
        stopped = ", ".join(result.interrupted)
        click.echo(f"Error: interrupted, state saved: {stopped}; rerun the same command to resume", err=True)
        return INTERRUPTED
    return 1 if result.failed else 0
