"""`expertctl expert`: experts that join a generalist later, leave it, or take another's place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .context import Session, pass_session
from .group import Group, cli_command
from .summaries import artefact_content, made

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
@with_output
@pass_session
def remove(session: Session, /, names: tuple[str, ...], **how: Any) -> None:
    """Take experts out of a generalist."""
    _change(session, remove=names, **how)


@cli_command("add", example="expertctl expert add law -m campus -o campus-with-law")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
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
    remove: tuple[str, ...] = (),
    add: Mapping[str, Path] | None = None,
    replace: Mapping[str, Path] | None = None,
) -> None:
    from ..core.workspace import check_name
    from ..merge.expert_changes import change_experts
    from ..merge.merging import MergeRun
    from ..merge.mixture.changing import Change
    from ..merge.plan import Permissions
    from .merge import MergeProgress

    folder = session.artefact(model)
    layout = session.layout()
    target = output
    if len(output.parts) == 1 and layout is not None:
        target = layout.generalists / check_name(output.name, "a generalist")
    change = Change(tuple(dict.fromkeys(remove)), add or {}, replace or {})
    allowed = Permissions(licences=allow_licences)
    run = MergeRun(force=force, resume=resume, permissions=allowed, say=session.note)
    with MergeProgress(session) as progress:
        manifest = change_experts(folder, target, change, layout=layout, run=progress.watched(run))
    record = manifest.config.get("mixture") or {}
    experts = record.get("experts") or [parent.name for parent in manifest.parents if parent.kind == "expert"]
    session.finish(
        {
            **artefact_content(target, manifest),
            "experts": list(experts),
            "history": record.get("history", []),
        },
        made(target, manifest),
        f"its experts: {', '.join(experts)}",
    )


command.add_command(remove)
command.add_command(add)
command.add_command(replace)
