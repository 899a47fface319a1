"""`expertctl rename`: give an artefact another name."""

from __future__ import annotations

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..summaries import show_artefact


@cli_command("rename", example="expertctl rename law law-2026")
@click.argument("name", metavar="NAME")
@click.argument("new_name", metavar="NEW")
@pass_session
def command(session: Session, name: str, new_name: str) -> None:
    """Rename a finished expert, baseline or generalist.

    Its tensors stay as they are. An artefact that others were made of keeps its name, because they record it. Statistics of
    an expert are removed. expertctl.yaml is not changed.
    """
    from ...core.manifests.records import record_as_json

    workspace = session.open()
    if name in workspace.memories:
        memory = workspace.memories.rename(name, new_name)
        session.finish(record_as_json(memory), f"memory '{name}' is now '{new_name}'")
        return
    manifest = workspace.rename(name, new_name)
    if name in workspace.config.experts or name in workspace.config.merges:
        session.note(f"expertctl.yaml still declares '{name}'; change the name there too, or it is made again")
    show_artefact(session, workspace.layout.artefact(new_name), manifest)
