"""`expertctl branch`: start an expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..output import shares
from ..parsing import as_dictionary, setting, weights
from ..parsing import settings as key_values

if TYPE_CHECKING:
    from ...experts.runs.specification import RunSpec


@cli_command("branch", example="expertctl branch law --domain law --trains feed_forward --tokens 200000")
@click.argument("name", metavar="[NAME]", required=False)
@click.option(
    "--clusters",
    metavar="SET",
    help="Start an expert for each cluster of this set (`data discover`), dividing --tokens among them.",
)
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
@click.option(
    "--dp",
    type=key_values,
    metavar="epsilon=E,delta=D",
    help="Train with differential privacy: epsilon, delta, and perhaps clip, accountant, noise, embedding_noise.",
)
@click.option("--owner", metavar="TEXT", help="Who owns the data; noted in expert.json.")
@click.option(
    "--licence", metavar="TEXT", help="Under which licence the expert stands; noted in expert.json."
)
@click.option("--force", is_flag=True, help="Replace an expert of that name.")
@pass_session
def command(
    session: Session,
    name: str | None,
    clusters: str | None,
    domain: str | None,
    trains: str | None,
    start: str | dict[str, float] | None,
    tokens: int | None,
    settings: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
    dp: dict[str, Any] | None,
    owner: str | None,
    licence: str | None,
    force: bool,
) -> None:
    """Start an expert: its parents, its domain, what of it trains.

    `expertctl train NAME` then trains it. What is not given comes from `experts.NAME` in expertctl.yaml.
    """
    training = as_dictionary([*settings, *([("tokens", tokens)] if tokens is not None else [])])
    given: dict[str, Any] = {
        "trains": trains,
        "start": start,
        "training": training or None,
        "options": as_dictionary(options) or None,
        "dp": dp,
        "owner": owner,
        "licence": licence,
        "force": force,
    }
    if (name is None) == (clusters is None):
        raise click.UsageError("give the NAME of one expert, or --clusters SET for one expert each")
    if clusters is not None:
        if domain is not None:
            raise click.UsageError("--clusters says which domains; leave out --domain")
        specs = session.open().branch_clusters(clusters, **given)
        steps = sum(spec.training.steps for spec in specs)
        session.finish(
            {"experts": [_content(spec) for spec in specs]},
            f"{len(specs)} experts, {specs[0].name} to {specs[-1].name}, {steps:,} steps in all; go on with: expertctl train",
        )
        return
    assert name is not None
    spec = session.open().branch(name, domain=domain, **given)
    session.finish(
        _content(spec),
        f"expert '{name}' starts from {shares(spec.start)} and trains {spec.trains} on {spec.domains[0]}, "
        f"{spec.training.steps:,} steps; go on with: expertctl train {name}",
    )


def _content(spec: RunSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "domain": spec.domains[0],
        "trains": spec.trains,
        "from": dict(spec.start),
        "training": spec.training.model_dump(mode="json"),
        **({"dp": spec.dp.model_dump(mode="json")} if spec.dp is not None else {}),
    }
