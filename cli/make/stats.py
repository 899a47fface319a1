"""`expertctl stats`: gather what merges by RegMean and Fisher need to know of an expert."""

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
    help="gram: inputs' second moments, for regmean; fisher: gradients' squares, for fisher.",
)
@click.option(
    "--domain", metavar="DOMAIN", help="Text to gather on. Default: what the expert was trained on."
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="Blocks of text.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where to. Default: statistics/EXPERT.",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
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
    """Gather statistics on experts, beside their data.

    The text stays where it is; second moments of it are written, which whoever merges needs.
    """
    if output is not None and len(experts) > 1:
        raise click.UsageError("-o takes the statistics of one expert")
    workspace = session.open()
    found: dict[str, Any] = {}
    for name in experts:
        with session.count(f"{kind} of {name}", "blocks", samples) as count:
            found[name] = workspace.statistics(
                name, kind=kind, domain=domain, samples=samples, output=output, force=force, tell=count.to
            )
    session.finish(
        {"statistics": found},
        *(
            f"{kind} of {name} on {number(one['blocks'])} blocks of {one['domain']['name']}: {one['folder']}"
            for name, one in found.items()
        ),
    )
