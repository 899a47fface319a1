"""`expertctl stats`: collect the statistics that RegMean and Fisher merging need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import choice, flag, integer, option, path
from ..output import number


@cli_command("stats", example="expertctl stats law code --kind gram")
@click.argument("experts", metavar="EXPERT...", nargs=-1, required=True)
@choice(
    "--kind",
    ["gram", "fisher"],
    "gram: second moments of layer inputs, for regmean; fisher: squared gradients, for fisher.",
    default="gram",
)
@option("--domain", "DOMAIN", "Domain to collect on. Default: the expert's training domain.")
@integer("--samples", "Number of blocks of text.", default=256)
@path("-o, --output", "DIR", "Output folder. Default: statistics/EXPERT.")
@flag("--force", "Replace existing output.")
@pass_session
def command(
    session: Session,
    experts: tuple[str, ...],
    kind: str,
    domain: str | None,
    samples: int,
    output: Path | None,
    force: bool,
) -> None:
    """Collect statistics of experts on their data, for merging.

    Runs where the data is. Only aggregated second moments are written, no text.
    """
    if output is not None and len(experts) > 1:
        raise click.UsageError("-o writes the statistics of one expert; name only one")
    workspace = session.open()
    statistics: dict[str, Any] = {}
    for name in experts:
        with session.progress() as progress:
            statistics[name] = workspace.experts.statistics(
                name, kind=kind, domain=domain, samples=samples, output=output, force=force, reporter=progress
            )
    session.finish(
        {"statistics": statistics},
        *(
            f"{kind} of {name} on {number(summary['blocks'])} blocks of {summary['domain']['name']}: {summary['folder']}"
            for name, summary in statistics.items()
        ),
    )
