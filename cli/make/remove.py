"""`expertctl remove`: remove an artefact or an unfinished run."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag


@cli_command("remove", example="expertctl remove law")
@click.argument("name")
@flag("--force", "Remove it even if other artefacts were made of it.")
@pass_session
def command(session: Session, name: str, force: bool) -> None:
    """Remove an expert, baseline, generalist or seed, finished or not.

    Artefacts that were made of it are listed; without `--force`, it is then kept. The text of domains and
    expertctl.yaml are not changed.
    """
    workspace = session.open()
    others = workspace.remove(name, force=force)
    declared = name in workspace.config.experts or name in workspace.config.merges
    if declared:
        session.note(f"expertctl.yaml still declares '{name}'; `train` and `merge` make it again")
    affected = f"; made of it: {', '.join(other.name for other in others)}" if others else ""
    session.finish(
        {"removed": name, "dependents": [asdict(other) for other in others], "declared": declared},
        f"removed '{name}'{affected}",
    )
