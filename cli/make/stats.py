"""`expertctl stats`: collect the statistics that RegMean and Fisher merging need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..output import number


@cli_command("stats", example="expertctl stats law code --kind gram")
@click.argument("experts", metavar="EXPERT...", nargs=-1, required=True)
@click.option(
    "--kind",
    type=click.Choice(["gram", "fisher"]),
    default="gram",
    show_default=True,
    help="gram: second moments of layer inputs, for regmean; fisher: squared gradients, for fisher.",
)
@click.option("--domain", metavar="DOMAIN", help="Domain to collect on. Default: the expert's training domain.")
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="Number of blocks of text.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Output folder. Default: statistics/EXPERT.",
)
@click.option("--force", is_flag=True, help="Replace existing output.")
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
