"""`expertctl reproduce`: make a generalist again from its manifest and compare every byte."""

from __future__ import annotations

from pathlib import Path

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..parsing import named_folder


@cli_command("reproduce", example="expertctl reproduce soup")
@click.argument("manifest", metavar="MANIFEST")
@click.option(
    "--model",
    "models",
    type=named_folder,
    multiple=True,
    metavar="NAME=DIR",
    help="Where a model is that is not found by its name.",
)
@pass_session
def command(session: Session, manifest: str, models: tuple[tuple[str, Path], ...]) -> int:
    """Merge again what a manifest describes and compare bytes.

    MANIFEST is a generalist by name, its folder, or its generalist.json. Nothing is kept of the second merge.
    The exit status is 1 when it came out otherwise.
    """
    from ...core.artefacts.lineage import read_manifest
    from ...merge.merging import MergeRun
    from ...merge.remaking.reproducing import reproduce
    from ..make.merge import MergeProgress

    path = Path(manifest)
    folder = path.parent.resolve() if path.is_file() else session.artefact(manifest)
    with MergeProgress(session) as progress:
        found = reproduce(
            read_manifest(folder),
            folder,
            layout=session.layout(),
            models=dict(models),
            run=progress.watched(MergeRun(say=session.note)),
        )
    verdict = "every byte is the same" if found.same else "it came out otherwise"
    session.finish(
        {"same": found.same, "differences": list(found.differences), "versions": list(found.versions)},
        "\n".join(
            [f"{folder.name}: {verdict}", *(f"  {line}" for line in (*found.differences, *found.versions))]
        ),
    )
    return 0 if found.same else 1
