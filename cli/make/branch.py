"""`expertctl branch`: create an expert that is ready to train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag, option, training_settings, with_training
from ..output import shares
from ..parsing import settings as key_values
from ..parsing import weights

if TYPE_CHECKING:
    from ...core.manifests.run import RunSpec


@cli_command("branch", example="expertctl branch law --domain law --trains feed_forward --tokens 200000")
@click.argument("name", metavar="[NAME]", required=False)
@option(
    "--clusters",
    "SET",
    "Create an expert for each cluster of this set (see `data discover`) and divide --tokens among them.",
)
@option("--domain", "DOMAIN", "Domain to train on. Default: the domain of NAME in expertctl.yaml.")
@option(
    "--trains",
    "PARAMETERS",
    "Trainable parameters: all, feed_forward, another trainer, or a pattern of tensor names. Default: all.",
)
@option(
    "--from",
    "START",
    "Starting point: seed, auto (average of experts, weighted by the domain posterior), or a:0.6,b:0.4. Default: seed.",
    name="start",
    type=weights,
)
@with_training
@option(
    "--dp",
    "epsilon=E,delta=D",
    "Train with differential privacy: epsilon and delta; optional: clip, accountant, noise, embedding_noise.",
    type=key_values,
)
@option("--owner", "TEXT", "Owner of the data, recorded in expert.json.")
@option("--licence", "TEXT", "Licence of the expert, recorded in expert.json.")
@flag("--force", "Replace an existing expert of that name.")
@pass_session
def command(
    session: Session,
    /,
    name: str | None,
    clusters: str | None,
    domain: str | None,
    tokens: int | None,
    settings: dict[str, Any],
    options: dict[str, Any],
    **run_settings: Any,
) -> None:
    """Create an expert, ready to train.

    Train it with `expertctl train NAME`. Omitted options default to `experts.NAME` in expertctl.yaml.
    """
    run_settings |= {"training": training_settings(tokens, settings) or None, "options": options or None}
    if (name is None) == (clusters is None):
        raise click.UsageError("give the NAME of one expert, or --clusters SET for one expert per cluster")
    if clusters is not None:
        if domain is not None:
            raise click.UsageError("--clusters selects the domains; omit --domain")
        specs = session.open().experts.branch_clusters(clusters, **run_settings)
        steps = sum(spec.training.steps for spec in specs)
        session.finish(
            {"experts": [_content(spec) for spec in specs]},
            f"{len(specs)} experts, {specs[0].name} to {specs[-1].name}, {steps:,} steps in total; next: expertctl train",
        )
        return
    assert name is not None
    spec = session.open().branch(name, domain=domain, **run_settings)
    session.finish(
        _content(spec),
        f"expert '{name}' starts from {shares(spec.start)} and trains {spec.trains} on {spec.domains[0]}, "
        f"{spec.training.steps:,} steps; next: expertctl train {name}",
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
