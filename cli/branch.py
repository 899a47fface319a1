"""`expertctl branch`: start an expert."""

from __future__ import annotations

from typing import Any

import click

from .context import Session, pass_session
from .group import cli_command
from .output import shares
from .parsing import as_dictionary, setting, weights


@cli_command("branch", example="expertctl branch law --domain law --trains feed_forward --tokens 200000")
@click.argument("name", metavar="NAME")
@click.option(
    "--domain", metavar="DOMAIN", help="What it trains on. Default: what expertctl.yaml says of NAME."
)
@click.option(
    "--trains",
    metavar="PART",
    help="What of it trains: all, feed_forward, another trainer, or a pattern of tensor names. Default: all.",
)
@click.option(
    "--from",
    "start",
    type=weights,
    metavar="START",
    help="Where it starts: seed, auto (the experts nearest to the domain), or a:0.6,b:0.4. Default: seed.",
)
@click.option("--tokens", type=int, metavar="N", help="Training budget in tokens.")
@click.option(
    "--set", "settings", type=setting, multiple=True, metavar="KEY=VALUE", help="Any other training setting."
)
@click.option(
    "--option", "options", type=setting, multiple=True, metavar="KEY=VALUE", help="An option of the trainer."
)
@click.option("--owner", metavar="TEXT", help="Who owns the data; noted in expert.json.")
@click.option(
    "--licence", metavar="TEXT", help="Under which licence the expert stands; noted in expert.json."
)
@click.option("--force", is_flag=True, help="Replace an expert of that name.")
@pass_session
def command(
    session: Session,
    name: str,
    domain: str | None,
    trains: str | None,
    start: str | dict[str, float] | None,
    tokens: int | None,
    settings: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
    owner: str | None,
    licence: str | None,
    force: bool,
) -> None:
    """Start an expert: its parents, its domain, what of it trains.

    `expertctl train NAME` then trains it. What is not given comes from `experts.NAME` in expertctl.yaml.
    """
    training = as_dictionary([*settings, *([("tokens", tokens)] if tokens is not None else [])])
    spec = session.open().branch(
        name,
        domain=domain,
        trains=trains,
        start=start,
        training=training or None,
        options=as_dictionary(options) or None,
        owner=owner,
        licence=licence,
        force=force,
    )
    session.finish(
        {
            "name": spec.name,
            "domain": spec.domains[0],
            "trains": spec.trains,
            "from": dict(spec.start),
            "training": spec.training.model_dump(mode="json"),
        },
        f"expert '{name}' starts from {shares(spec.start)} and trains {spec.trains} on {spec.domains[0]}, "
        f"{spec.training.steps:,} steps; go on with: expertctl train {name}",
    )
