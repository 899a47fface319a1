"""`expertctl merge`: experts become a generalist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .context import Session, pass_session
from .group import cli_command
from .output import shares
from .parsing import as_dictionary, names, setting, weights


@cli_command("merge", example="expertctl merge forest --method ensemble --experts code,law --option top_k=1")
@click.argument("name", metavar="NAME")
@click.option("--method", metavar="METHOD", help="How to merge; `expertctl plugins` lists the methods.")
@click.option("--experts", type=names, metavar="A,B", help="Which experts. Default: every finished one.")
@click.option(
    "--weights",
    "shares_",
    type=weights,
    metavar="WEIGHTS",
    help="How much each counts: uniform, posterior (by the domain posterior), or a:0.6,b:0.4. Default: uniform.",
)
@click.option(
    "--option", "options", type=setting, multiple=True, metavar="KEY=VALUE", help="An option of the method."
)
@click.option(
    "--fit-on",
    type=names,
    metavar="A,B",
    help="Domains whose validation text priors and posterior weights are fitted on. Default: the experts' own.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where to. Default: generalists/NAME.",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
@pass_session
def command(
    session: Session,
    name: str,
    method: str | None,
    experts: tuple[str, ...] | None,
    shares_: str | dict[str, float] | None,
    options: tuple[tuple[str, Any], ...],
    fit_on: tuple[str, ...] | None,
    output: Path | None,
    force: bool,
) -> None:
    """Merge the seed and its experts into a generalist.

    What is not given comes from `merges.NAME` in expertctl.yaml. Everything that can be refused is refused
    before any work is done.
    """
    workspace = session.open()
    manifest = workspace.merge(
        name,
        method=method,
        experts=experts,
        weights=shares_,
        options=as_dictionary(options) or None,
        fit_on=fit_on,
        output=output,
        force=force,
        say=session.note,
    )
    from .summaries import artefact_content, made

    folder = output if output is not None else workspace.generalists / name
    session.finish(
        artefact_content(folder, manifest),
        made(folder, manifest),
        f"{manifest.config['method']} of {shares(manifest.config['weights'])}",
    )
