"""`expertctl reproduce`: repeat a merge from its manifest and compare the bytes."""

from __future__ import annotations

from pathlib import Path

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import option
from ..output import listing
from ..parsing import named_folder


@cli_command("reproduce", example="expertctl reproduce soup")
@click.argument("manifest", metavar="MANIFEST")
@option(
    "--model",
    "NAME=DIR",
    "Folder of a model that is not found by its name; repeatable.",
    name="models",
    type=named_folder,
    multiple=True,
)
@pass_session
def command(session: Session, manifest: str, models: tuple[tuple[str, Path], ...]) -> int:
    """Repeat a merge from its manifest and compare the bytes.

    MANIFEST is the name of a generalist, its folder, or its generalist.json. The new merge is deleted afterwards. The
    exit status is 1 if it differs.
    """
    from ...core.manifests.manifest import read_manifest
    from ...merge.merging import MergeRun
    from ...merge.remaking.reproducing import reproduce

    path = Path(manifest)
    folder = path.parent.resolve() if path.is_file() else session.artefact(manifest)
    with session.progress() as reporter:
        reproduction = reproduce(
            read_manifest(folder), folder, layout=session.layout(), models=dict(models), run=MergeRun(reporter=reporter)
        )
    verdict = "byte-identical" if reproduction.same else "different"
    differences, versions = list(reproduction.differences), list(reproduction.versions)
    session.finish(
        {"same": reproduction.same, "differences": differences, "versions": versions},
        listing(f"{folder.name}: {verdict}", [*differences, *versions]),
    )
    return 0 if reproduction.same else 1
