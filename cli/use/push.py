"""`expertctl push`: upload an artefact to remote storage or the Hugging Face hub."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag, integer, option


@cli_command("push", example="expertctl push law s3://models/law")
@click.argument("artefact", metavar="ARTEFACT")
@click.argument("url", metavar="URL")
@flag("--private", "Make a new repository on the Hugging Face hub private.")
@option("--revision", "BRANCH", "Branch of the repository on the hub. Default: main.")
@integer("--jobs", "Number of files to upload at the same time.", default=4)
@flag("--force", "Replace what is at the URL.")
@pass_session
def command(
    session: Session, artefact: str, url: str, private: bool, revision: str | None, jobs: int, force: bool
) -> None:
    """Upload an artefact, or another folder, to a URL.

    URL is one of fsspec, such as s3://bucket/law or file:///mnt/law, or hub:OWNER/NAME for the Hugging Face hub. The folder
    is uploaded as it is, checked against its manifest. An interrupted push is resumed by the same command.
    """
    from ...core.manifests.pushing import push
    from ...core.remote.transfers import Transfer
    from ...core.remote.urls import without_secrets
    from ...merge.generalists.card import model_card

    folder = session.artefact(artefact)
    with session.progress() as progress:
        done = push(
            folder,
            url,
            card=model_card,
            private=private,
            revision=revision,
            force=force,
            transfer=Transfer(jobs, reporter=progress),
        )
    place = without_secrets(url)
    line = f"{folder.name} is at {place}: {done.files} files, {done.sent} of them sent now ({done.bytes:,} bytes)"
    session.finish({"name": folder.name, "url": place, **asdict(done)}, line)
