"""`expertctl init`: create a workspace."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag, path


@cli_command("init", example="expertctl init demo --bundled")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@path("--seed", "FOLDER", "Use this Hugging Face causal language model as the seed. Default: pretrain a seed.")
@flag("--bundled", "List the bundled corpora, which are already installed, as domains.")
@pass_session
def command(session: Session, folder: Path, seed: Path | None, bundled: bool) -> None:
    """Create a workspace with a commented expertctl.yaml."""
    from ...core.artefacts.files import os_errors_as_user_errors, write_text
    from ...core.artefacts.layout import CONFIG_FILE
    from ...core.errors import UserError
    from .project_file import project_file

    target = folder / CONFIG_FILE
    if target.exists():
        raise UserError(f"{target} already exists; edit it, or choose another folder")
    if seed is not None and not (seed / "config.json").is_file():
        raise UserError(f"{seed} has no config.json: it is not a Hugging Face model folder")
    with os_errors_as_user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(target, project_file(seed=seed.resolve() if seed else None, bundled=bundled))
    first_step = "" if bundled else "add your domains to it; "
    session.finish(
        {"workspace": str(folder.resolve()), "config": str(target.resolve())},
        f"created {target}; {first_step}next: cd {shlex.quote(str(folder))} && expertctl seed",
    )
