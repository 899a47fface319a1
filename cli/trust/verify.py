"""`expertctl verify`: check artefacts against their manifests."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import option
from ..output import listing

if TYPE_CHECKING:
    from ...merge.mixture.absence import Absence


@cli_command("verify", example="expertctl verify forest")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@option("--absent", "EXPERT", "Check that no tensor of this expert (a name or a folder) is in the named models.")
@pass_session
def command(session: Session, names: tuple[str, ...], absent: str | None) -> int:
    """Check every byte of artefacts against their manifests.

    Default: all artefacts. Differences are listed, and the exit status is then 1. `--absent` also searches for the
    digests of an expert's tensors and lists what was trained jointly with that expert.
    """
    if absent is not None and not names:
        raise click.UsageError("--absent needs the models to search: expertctl verify MODEL --absent EXPERT")
    if names:
        folders = {name: _artefact_or_memory(session, name) for name in names}
    else:
        layout = session.open().layout
        folders = {folder.name: folder for folder in (*layout.finished(), *layout.finished_memories())}
    with session.progress() as progress:
        problems_by_name = {}
        for done, (name, folder) in enumerate(folders.items(), start=1):
            problems_by_name[name] = _problems(folder)
            progress.progress("checking", done, len(folders), "artefacts")
    absences = {name: _find_absence(session, folder, absent) for name, folder in folders.items()} if absent else {}
    session.finish(
        {
            **({"absent": {name: asdict(absence) for name, absence in absences.items()}} if absences else {}),
            "intact": not any(problems_by_name.values()),
            "artefacts": {
                name: {"folder": str(folders[name]), "problems": problems}
                for name, problems in problems_by_name.items()
            },
        },
        *(
            listing(f"{name}: {'changed' if problems else 'intact'}", problems)
            for name, problems in problems_by_name.items()
        ),
        *(_absence_lines(name, absence) for name, absence in absences.items()),
    )
    damaged = [name for name, problems in problems_by_name.items() if problems]
    if damaged:
        click.echo(f"Error: changed since they were made: {', '.join(damaged)}; restore or recreate them", err=True)
    present = [name for name, absence in absences.items() if absence.found or absence.merged]
    if present:
        click.echo(f"Error: '{absent}' is in {', '.join(present)}", err=True)
    return 1 if damaged or present else 0


def _artefact_or_memory(session: Session, name: str) -> Path:
    from ...core.errors import UserError

    try:
        return session.memory(name)
    except UserError:
        return session.artefact(name)


def _find_absence(session: Session, folder: Path, expert: str) -> Absence:
    from ...merge.mixture.absence import find_expert, find_own_expert

    return find_own_expert(folder, expert) or find_expert(folder, session.artefact(expert))


def _absence_lines(name: str, absence: Absence) -> str:
    lines = [*([f"according to its manifest, {absence.merged}"] if absence.merged else []), *absence.traces]
    return listing(f"{name}: {_verdict(absence)}", lines)


def _verdict(absence: Absence) -> str:
    if absence.trained_inside:
        return f"'{absence.expert}' was trained inside the model and {'is part of it' if absence.merged else 'was removed'}"
    if absence.found:
        return f"contains {len(absence.found)} of {absence.compared} tensors of '{absence.expert}', such as {absence.found[0]}"
    return f"contains none of the {absence.compared} tensors of '{absence.expert}'"


def _problems(folder: Path) -> list[str]:
    from ...core.artefacts.layout import MEMORY_MANIFEST
    from ...core.errors import UserError
    from ...core.manifests.verification import verify
    from ...core.models.decoding.memories.manifest import verify_memory

    try:
        return verify_memory(folder) if (folder / MEMORY_MANIFEST).is_file() else verify(folder)
    except UserError as error:  # unreadable manifest
        return [str(error)]
