"""`expertctl seed`: import or pretrain the model that experts start from."""

from __future__ import annotations

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import Number, flag, integer, option
from ..summaries import show_artefact


@cli_command("seed", example="expertctl seed --from models/SmolLM2-135M")
@option(
    "--from",
    "SOURCE",
    "Import this Hugging Face causal language model: a folder, whose files are linked, a URL, or hub:OWNER/NAME[@REVISION].",
    name="source",
)
@flag("--scratch", "Pretrain a seed even if expertctl.yaml names a model to import.")
@option("--preset", "NAME", "Size of a pretrained seed: tiny, small, base, medium or large.")
@click.option(
    "--bos/--no-bos",
    default=None,
    help="Begin every document with the imported tokenizer's BOS token, or not. Default: as the tokenizer does itself.",
)
@click.option(
    "--token",
    "tokens",
    metavar="TOKEN",
    multiple=True,
    help="Add a special token to the tokenizer, such as a mask for infilling; repeatable.",
)
@option(
    "--rope-base",
    "N",
    "Replace the RoPE base of the imported model, such as by 500000 to train it on longer texts.",
    type=Number(min=1, min_open=True),
)
@integer("--positions", "Replace the number of positions of the imported model by at least as many.", metavar="N")
@flag("--force", "Replace the existing seed. Experts of the old seed cannot be merged with the new one.")
@pass_session
def command(
    session: Session,
    source: str | None,
    scratch: bool,
    preset: str | None,
    bos: bool | None,
    tokens: tuple[str, ...],
    rope_base: float | None,
    positions: int | None,
    force: bool,
) -> None:
    """Make the seed: import a model or pretrain a small one.

    Without options, the section `seed` of expertctl.yaml applies. Interrupted pretraining is resumed.
    """
    if source is not None and (scratch or preset is not None):
        raise click.UsageError("--from imports a model; --scratch and --preset are for pretraining one")
    workspace = session.open()
    with session.progress("seed") as progress:
        manifest = workspace.seed(
            source,
            scratch=scratch or preset is not None,
            preset=preset,
            bos=bos,
            tokens=tokens or None,
            rope_base=rope_base,
            positions=positions,
            force=force,
            reporter=progress,
        )
    show_artefact(session, workspace.layout.seed, manifest)
