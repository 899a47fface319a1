"""`expertctl federate ask`: request an expert from each owner, or start the rounds of a shared model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ...core.errors import UserError
from ..context import Session, pass_session
from ..group import cli_command
from ..options import fraction, integer, option, training_settings
from .options import coordinator_of, recipe_from, with_recipe
from .shared import shared_line

if TYPE_CHECKING:
    from ...experts.federation.judging.round_weights import AveragingRules

ROUNDS, QUORUM, NAME = 10, 0.5, "shared"  # defaults of the options


@cli_command("ask", example="expertctl federate ask --experts site-a,site-b --recipe flexolmo --deadline 48h")
@option("--experts", "NAME,...", "Owners to ask.", name="owners", required=True)
@with_recipe
@integer("--rounds", f"diloco, fedavg: number of rounds. Default: {ROUNDS}")
@fraction(
    "--quorum", "SHARE", f"diloco, fedavg: share of the owners that a round needs at its deadline. Default: {QUORUM}"
)
@option(
    "--grace",
    "TIME",
    "diloco, fedavg: wait only this long for further owners after the quorum. Default: until the deadline",
)
@integer(
    "--late",
    "diloco, fedavg: rounds for which a delivery still counts after its own round, with half the share each. Default: 0",
)
@option("--name", "NAME", f"diloco, fedavg: name of the shared model. Default: {NAME}")
@option(
    "--priority",
    "N",
    "Owners train for requests of higher priority first, from -100 to 100.",
    type=click.IntRange(-100, 100),
    default=0,
)
@pass_session
def ask(
    session: Session,
    /,
    owners: str,
    deadline: str,
    rounds: int | None,
    quorum: float | None,
    grace: str | None,
    late: int | None,
    name: str | None,
    priority: int,
    **recipe: Any,
) -> None:
    """Request an expert from each owner, or start the rounds of a shared model.

    `serve` sends the requests as owners come online. Owners with an accepted expert for this seed and recipe are not asked
    again; an open request gets the later deadline. For a shared model, the same command again extends the deadline of the open
    round and readmits owners who were left out of it.
    """
    from datetime import UTC, datetime

    from ...experts.federation.coordinator.round_keeper import begin_rounds, status_of
    from ...experts.federation.protocol.requests import deadline_in
    from ...experts.federation.rounds.averaging import OUTER_RECIPES
    from ...experts.federation.rounds.rounds import RoundPlan
    from ...experts.federation.rounds.shared_model import SharedSettings

    names = list(dict.fromkeys(owner.strip() for owner in owners.split(",") if owner.strip()))
    if not names:
        raise UserError("--experts names no owner; write --experts site-a,site-b")
    now = datetime.now(UTC)
    until = deadline_in(deadline, now)
    if recipe["recipe_name"] in OUTER_RECIPES:
        seconds, name = (until - now).total_seconds(), name or NAME
        grace_seconds = (deadline_in(grace, now) - now).total_seconds() if grace is not None else None
        plan = RoundPlan(
            tuple(names),
            recipe["recipe_name"],
            quorum or QUORUM,
            seconds,
            _averaging_rules(recipe),
            grace_seconds,
            late or 0,
        )
        training = training_settings(recipe["tokens"], recipe["settings"])
        settings = SharedSettings(rounds or ROUNDS, training, priority)
        coordinator = coordinator_of(session)
        status = status_of(coordinator, begin_rounds(coordinator, name, plan, settings))
        session.finish(
            {"shared": asdict(status)},
            shared_line(status),
            f"`expertctl federate serve` runs the rounds; the result becomes generalists/{name}",
        )
        return
    if any(given is not None for given in (rounds, quorum, grace, late, name)):
        raise UserError(
            f"--rounds, --quorum, --grace, --late and --name apply only to the recipes {' and '.join(OUTER_RECIPES)}"
        )
    requests = coordinator_of(session).ask(names, recipe_from(**recipe), until, priority=priority)
    delivered = sorted(set(names) - {request.owner for request in requests})
    lines = [
        f"'{request.owner}' is asked until {request.deadline:%Y-%m-%d %H:%M} UTC: request {request.id}"
        for request in requests
    ]
    lines += [f"'{name}' has delivered an expert for this recipe" for name in delivered]
    session.finish(
        {
            "requests": [
                {"request": request.id, "owner": request.owner, "deadline": request.deadline} for request in requests
            ],
            "delivered": delivered,
        },
        *lines,
    )


def _averaging_rules(recipe: dict[str, Any]) -> AveragingRules:
    """Return the rules in the options of `with_recipe`; raises `UserError` if rounds do not support one."""
    from ...core.hooks.options import parse_options
    from ...experts.federation.judging.round_weights import AveragingRules

    name = recipe["recipe_name"]
    if recipe["dp"] is not None:
        raise UserError(
            f"'{name}' does not support differential privacy, which would need accounting over all rounds; choose btm or flexolmo "
            "with --dp"
        )
    rules: AveragingRules = parse_options(AveragingRules, recipe["options"], f"recipe '{name}'")
    return rules
