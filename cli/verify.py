"""`expertctl verify`: is everything what its manifest says?"""

from __future__ import annotations

from pathlib import Path

import click

from .context import Session, pass_session
from .group import cli_command


@cli_command("verify", example="expertctl verify forest")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@pass_session
def command(session: Session, names: tuple[str, ...]) -> int:
    """Check every byte of artefacts against their manifests.

    Default: all. What differs is named, and the exit status is then 1.
    """
    if names:
        folders = {name: session.artefact(name) for name in names}
    else:
        folders = {folder.name: folder for folder in session.open().layout.finished()}
    with session.count("checking", "artefacts", len(folders)) as count:
        found = {}
        for name, folder in folders.items():
            found[name] = _problems(folder)
            count.next()
    session.finish(
        {
            "intact": not any(found.values()),
            "artefacts": {
                name: {"folder": str(folders[name]), "problems": problems} for name, problems in found.items()
            },
        },
        *(_line(name, problems) for name, problems in found.items()),
    )
    damaged = [name for name, problems in found.items() if problems]
    if damaged:
        click.echo(f"Error: not as made: {', '.join(damaged)}; restore or remake what changed", err=True)
    return 1 if damaged else 0


def _problems(folder: Path) -> list[str]:
    from ..core.errors import UserError
    from ..core.lineage import verify

    try:
        return verify(folder)
    except UserError as error:  # a manifest that cannot be read
        return [str(error)]


def _line(name: str, problems: list[str]) -> str:
    return "\n".join(
        [f"{name}: {'intact' if not problems else 'changed'}", *(f"  {problem}" for problem in problems)]
    )
