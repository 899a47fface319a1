"""`expertctl card`: print or write the model card of an artefact."""

from __future__ import annotations

from pathlib import Path

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import path


@cli_command("card", example="expertctl card forest -o forest.md")
@click.argument("model", metavar="MODEL")
@path("--evaluation", "FILE", "Output of `expertctl eval --json`, shown as a table in the card.", file=True)
@path("-o, --output", "FILE", "Write the card to this file instead of printing it.")
@pass_session
def command(session: Session, model: str, evaluation: Path | None, output: Path | None) -> None:
    """Print the model card of a seed, expert or generalist.

    The card describes sources, method, licence and lineage, as recorded in the manifest.
    """
    from ...core.artefacts.files import read_json, write_text
    from ...core.errors import UserError
    from ...core.manifests.manifest import read_manifest
    from ...merge.generalists.card import model_card

    manifest = read_manifest(session.artefact(model))
    scores = read_json(evaluation) if evaluation is not None else None
    if scores is not None and not {"domains", "models"} <= scores.keys():
        raise UserError(f"{evaluation} is not the output of `expertctl eval --json`: 'domains' or 'models' is missing")
    text = model_card(manifest, scores)
    if output is None:
        session.finish({"name": manifest.name, "card": text}, text.rstrip("\n"))
        return
    write_text(output, text)
    session.finish({"name": manifest.name, "file": str(output)}, f"the card of {manifest.name} is in {output}")
