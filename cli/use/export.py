"""`expertctl export`: write a model in the layout of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag, option, pairs, path


@cli_command("export", example="expertctl export law --to gguf -o law.gguf --option dtype=f16")
@click.argument("model", metavar="MODEL")
@option("--to", "NAME", "Exporter; `expertctl plugins` lists the choices.", required=True)
@path("-o, --output", "PATH", "Output: a folder, or a file for gguf.", required=True)
@pairs("--option", "options", "Set an option of the exporter; repeatable.")
@flag("--force", "Replace existing output.")
@pass_session
def command(session: Session, model: str, to: str, output: Path, options: dict[str, Any], force: bool) -> None:
    """Write a seed, expert or generalist in the layout of other tools.

    An expert is written as a whole model: its seed with the trained tensors, or with its LoRA adapter applied.
    """
    from ...merge.generalists.exporting import export_model

    with session.progress() as progress:
        done = export_model(session.artefact(model), to, output, options, force=force, reporter=progress)
    for note in done.notes:
        session.note(note)
    files = f"{len(done.files)} file{'' if len(done.files) == 1 else 's'}, {sum(done.files.values()):,} bytes"
    content = {"name": done.name, "exporter": done.exporter, "output": str(output), "files": dict(done.files)}
    session.finish({**content, "notes": list(done.notes)}, f"{done.name} is in {output}: {files}")
