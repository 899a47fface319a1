"""`expertctl verify`: is everything what its manifest says?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..context import Session, pass_session
from ..group import cli_command

if TYPE_CHECKING:
    from ...merge.mixture.absence import Absence


@cli_command("verify", example="expertctl verify forest")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option(
    "--absent",
    metavar="EXPERT",
    help="Prove that no tensor of this expert (a name, or its folder) is in the named models.",
)
@pass_session
def command(session: Session, names: tuple[str, ...], absent: str | None) -> int:
    """Check every byte of artefacts against their manifests.

    Default: all. What differs is named, and the exit status is then 1. With `--absent` the digests of an expert's
    tensors are looked for as well, and it is said what was trained jointly while that expert was there.
    """
    if absent is not None and not names:
        raise click.UsageError("--absent needs the models to look in: expertctl verify MODEL --absent EXPERT")
    if names:
        folders = {name: session.artefact(name) for name in names}
    else:
        folders = {folder.name: folder for folder in session.open().layout.finished()}
    with session.count("checking", "artefacts", len(folders)) as count:
        found = {}
        for name, folder in folders.items():
            found[name] = _problems(folder)
            count.next()
    absences = {name: _absence(session, folder, absent) for name, folder in folders.items()} if absent else {}
    session.finish(
        {
            **({"absent": {name: asdict(one) for name, one in absences.items()}} if absences else {}),
            "intact": not any(found.values()),
            "artefacts": {
                name: {"folder": str(folders[name]), "problems": problems} for name, problems in found.items()
            },
        },
        *(_line(name, problems) for name, problems in found.items()),
        *(_absence_lines(name, one) for name, one in absences.items()),
    )
    damaged = [name for name, problems in found.items() if problems]
    if damaged:
        click.echo(f"Error: not as made: {', '.join(damaged)}; restore or remake what changed", err=True)
    present = [name for name, one in absences.items() if one.found or one.merged]
    if present:
        click.echo(f"Error: '{absent}' is in {', '.join(present)}", err=True)
    return 1 if damaged or present else 0


def _absence(session: Session, folder: Path, expert: str) -> Absence:
    from ...merge.mixture.absence import find_expert, find_own_expert

    return find_own_expert(folder, expert) or find_expert(folder, session.artefact(expert))


def _absence_lines(name: str, one: Absence) -> str:
    lines = [*([f"by its manifest, {one.merged}"] if one.merged else []), *one.traces]
    return "\n".join([f"{name}: {_verdict(one)}", *(f"  {line}" for line in lines)])


def _verdict(one: Absence) -> str:
    if one.made_in_it:
        return f"'{one.expert}' was trained in it, and {'is there' if one.merged else 'has left'}"
    if one.found:
        return (
            f"{len(one.found)} of {one.compared} tensors of '{one.expert}' are in it, such as {one.found[0]}"
        )
    return f"no tensor of '{one.expert}' is in it ({one.compared} looked for)"


def _problems(folder: Path) -> list[str]:
    from ...core.artefacts.lineage import verify
    from ...core.errors import UserError

    try:
        return verify(folder)
    except UserError as error:  # a manifest that cannot be read
        return [str(error)]


def _line(name: str, problems: list[str]) -> str:
    return "\n".join(
        [f"{name}: {'intact' if not problems else 'changed'}", *(f"  {problem}" for problem in problems)]
    )
