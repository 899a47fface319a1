"""`expertctl pull`: download an artefact from remote storage or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag, integer, path
from ..summaries import show_artefact


@cli_command("pull", example="expertctl pull s3://models/law")
@click.argument("url", metavar="URL")
@click.argument("name", metavar="[NAME]", required=False)
@path("-o, --output", "DIR", "Write to this folder instead of the workspace, also what is no artefact.")
@integer("--jobs", "Number of parts to download at the same time.", default=4)
@flag("--force", "Replace an existing artefact of this name.")
@pass_session
def command(session: Session, url: str, name: str | None, output: Path | None, jobs: int, force: bool) -> None:
    """Download an artefact into the workspace, under its name or NAME.

    URL is one of fsspec, such as s3://bucket/law, or hub:OWNER/NAME[@REVISION] for the Hugging Face hub. The artefact appears
    when all its bytes have been checked. An interrupted pull is resumed by the same command.
    """
    from ...core.manifests.pulling import pull
    from ...core.remote.transfers import Transfer
    from ...merge.generalists.card import model_card

    if name is not None and output is not None:
        raise click.UsageError("NAME is for the workspace; --output gives the whole folder")
    layout = session.open().layout if output is None else None
    with session.progress() as progress:
        pulled = pull(
            url,
            layout,
            name,
            card=model_card,
            output=output,
            force=force,
            transfer=Transfer(jobs, reporter=progress),
        )
    if pulled.manifest is not None:
        show_artefact(session, pulled.folder, pulled.manifest)
    else:
        session.finish({"folder": str(pulled.folder.resolve())}, f"the files are in {pulled.folder}")
