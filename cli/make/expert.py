"""`expertctl expert`: experts that join a generalist later, leave it, or take another's place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import Group, cli_command
from ..summaries import artefact_content, made

if TYPE_CHECKING:
    from ...core.artefacts.lineage import Manifest
    from ...merge.mixture.changing import Change

output_options = [
    click.option(
        "-m", "--model", required=True, metavar="GENERALIST", help="What is changed; it stays as it is."
    ),
    click.option(
        "-o",
        "--output",
        required=True,
        type=click.Path(path_type=Path),
        metavar="NAME",
        help="The new generalist: a name in this workspace, or a folder.",
    ),
    click.option("--allow-licences", is_flag=True, help="Go on though licences contradict each other."),
    click.option("--force", is_flag=True, help="Replace what is there."),
    click.option("--resume", is_flag=True, help="Go on with what was interrupted."),
]


retrain_option = click.option(
    "--retrain",
    is_flag=True,
    help="Of a stitched model: train the stitches again, from where they are, as they were trained before.",
)


def with_output(function: click.decorators.FC) -> click.decorators.FC:
    for option in reversed(output_options):
        function = option(function)
    return function


@click.group("expert", cls=Group)
def command() -> None:
    """Add experts to a generalist, or take them out, without training.

    The result's tensors are those of a merge that was done with these experts in the first place, unless something was
    trained jointly since; then it is said which tensors have seen whom.
    """


@cli_command("remove", example="expertctl expert remove news -m campus -o campus-without-news")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@retrain_option
@with_output
@pass_session
def remove(session: Session, /, names: tuple[str, ...], **how: Any) -> None:
    """Take experts out of a generalist."""
    _change(session, remove=names, **how)


@cli_command("add", example="expertctl expert add law -m campus -o campus-with-law")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@retrain_option
@with_output
@pass_session
def add(session: Session, /, names: tuple[str, ...], **how: Any) -> None:
    """Let finished experts (names, or folders) join a generalist."""
    _change(session, add=dict(_folder(session, name) for name in names), **how)


@cli_command("replace", example="expertctl expert replace law -m campus -o campus-2 --by law-2027")
@click.argument("name", metavar="NAME")
@click.option("--by", required=True, metavar="EXPERT", help="What takes its place, under its name.")
@with_output
@pass_session
def replace(session: Session, /, name: str, by: str, **how: Any) -> None:
    """Let another expert take the place of one."""
    _change(session, replace={name: _folder(session, by)[1]}, **how)


def _folder(session: Session, name: str) -> tuple[str, Path]:
    folder = session.artefact(name)
    return folder.name, folder


def _change(
    session: Session,
    *,
    model: str,
    output: Path,
    allow_licences: bool,
    force: bool,
    resume: bool,
    retrain: bool = False,
    remove: tuple[str, ...] = (),
    add: Mapping[str, Path] | None = None,
    replace: Mapping[str, Path] | None = None,
) -> None:
    from ...merge.merging import MergeRun
    from ...merge.mixture.changing import Change
    from ...merge.planning.plan import Permissions
    from ...merge.remaking.expert_changes import change_experts
    from ...merge.sources.history import history_of
    from .merge import MergeProgress

    folder = session.artefact(model)
    layout = session.layout()
    target = layout.generalist(output) if layout is not None else output
    change = Change(tuple(dict.fromkeys(remove)), add or {}, replace or {})
    allowed = Permissions(licences=allow_licences)
    run = MergeRun(force=force, resume=resume, permissions=allowed, say=session.note)
    start = target
    if retrain:
        if layout is None or target.parent != layout.generalists:
            raise click.UsageError("--retrain makes a generalist of a workspace; give its name with -o")
        _require_stitches(folder)
        start = layout.generalists / f"{target.name}-untrained"
    with MergeProgress(session) as progress:
        manifest = change_experts(folder, start, change, layout=layout, run=progress.watched(run))
    if retrain:
        manifest = _retrained(session, target.name, start, change, force)
    record = manifest.config.get("mixture") or {}
    experts = record.get("experts") or [parent.name for parent in manifest.parents if parent.kind == "expert"]
    session.finish(
        {
            **artefact_content(target, manifest),
            "experts": list(experts),
            "history": history_of(manifest),
        },
        made(target, manifest),
        f"its experts: {', '.join(experts)}",
    )


def _require_stitches(folder: Path) -> None:
    from ...core.artefacts.lineage import read_manifest
    from ...core.errors import UserError

    manifest = read_manifest(folder)
    if manifest.config.get("kind") != "stitched":
        raise UserError(f"{folder} is not stitched, and --retrain trains stitches; leave it out")
    if "run" not in manifest.config:
        raise UserError(
            f"the stitches of {folder} were never trained; leave out --retrain, then use `expertctl tune`"
        )


def _retrained(session: Session, name: str, start: Path, change: Change, force: bool) -> Manifest:
    """Train the stitches of a changed model on the text of those who are there now, else as they were trained before."""
    from ...core.artefacts.lineage import read_manifest

    manifest = read_manifest(start)
    spec = manifest.config["run"]
    workspace = session.open()
    joined = [read_manifest(folder) for folder in (*change.add.values(), *change.replace.values())]
    gone = {
        domain
        for left in (*change.remove, *change.replace)
        for domain in workspace.trained_domains([workspace.experts / left])
    }
    domains = [domain for domain in spec["domains"] if domain not in gone]
    domains += [domain for one in joined for domain in one.data.get("domains", {}) if domain not in domains]
    with session.runs([name]) as progress:
        return workspace.tune(
            name,
            start.name,
            trains=spec["trains"],
            domains=domains,
            options=spec["options"],
            training={key: value for key, value in spec["training"].items() if value is not None},
            force=force,
            reporter=progress,
        )


command.add_command(remove)
command.add_command(add)
command.add_command(replace)
