"""`expertctl seed`: import or pretrain the model that experts start from."""

from __future__ import annotations

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag, option
from ..summaries import show_artefact


@cli_command("seed", example="expertctl seed --from models/SmolLM2-135M")
@option(
    "--from",
    "SOURCE",
    "Import this Hugging Face causal language model: a folder, whose files are linked, a URL, or hub:OWNER/NAME[@REVISION].",
    name="source",
)
@flag("--scratch", "Pretrain a seed even if expertctl.yaml names a model to import.")
@option("--preset", "NAME", "Size of a pretrained seed: tiny or small.")
@click.option(
    "--bos/--no-bos",
    default=None,
    help="Begin every document with the imported tokenizer's BOS token, or not. Default: as the tokenizer does itself.",
)
@flag("--force", "Replace the existing seed. Experts of the old seed cannot be merged with the new one.")
@pass_session
def command(
    session: Session, source: str | None, scratch: bool, preset: str | None, bos: bool | None, force: bool
) -> None:
    """Make the seed: import a model or pretrain a small one.

    Without options, the section `seed` of expertctl.yaml applies. Interrupted pretraining is resumed.
    """
    if source is not None and (scratch or preset is not None):
        raise click.UsageError("--from imports a model; --scratch and --preset are for pretraining one")
    workspace = session.open()
    with session.progress("seed") as progress:
        manifest = workspace.seed(
            source, scratch=scratch or preset is not None, preset=preset, bos=bos, force=force, reporter=progress
        )
    show_artefact(session, workspace.layout.seed, manifest)
