"""`expertctl federate ask`: request an expert from each owner, or start the rounds of a shared model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ...core.errors import UserError
from ..context import Session, pass_session
from ..group import cli_command
from ..options import integer, option
from ..parsing import as_dictionary
from .options import coordinator_of, recipe_from, training_from, with_recipe
from .shared import shared_content, shared_line

if TYPE_CHECKING:
    from ...experts.federation.rounds.rounds import RoundPlan
    from ...experts.federation.rounds.shared_model import SharedSettings

ROUNDS, QUORUM, NAME = 10, 0.5, "shared"  # defaults of the options


@cli_command("ask", example="expertctl federate ask --experts site-a,site-b --recipe flexolmo --deadline 48h")
@option("--experts", "NAME,...", "Owners to ask.", name="owners", required=True)
@with_recipe
@integer("--rounds", f"diloco, fedavg: number of rounds. Default: {ROUNDS}")
@option(
    "--quorum",
    "SHARE",
    f"diloco, fedavg: share of the owners that a round needs at its deadline. Default: {QUORUM}",
    type=click.FloatRange(0, 1, min_open=True),
)
@option("--name", "NAME", f"diloco, fedavg: name of the shared model. Default: {NAME}")
@pass_session
def ask(
    session: Session,
    /,
    owners: str,
    deadline: str,
    rounds: int | None,
    quorum: float | None,
    name: str | None,
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

    names = list(dict.fromkeys(owner.strip() for owner in owners.split(",") if owner.strip()))
    if not names:
        raise UserError("--experts names no owner; write --experts site-a,site-b")
    now = datetime.now(UTC)
    until = deadline_in(deadline, now)
    if recipe["recipe_name"] in OUTER_RECIPES:
        seconds, name = (until - now).total_seconds(), name or NAME
        plan, settings = _plan_from(names, seconds, rounds or ROUNDS, quorum or QUORUM, **recipe)
        coordinator = coordinator_of(session)
        status = status_of(coordinator, begin_rounds(coordinator, name, plan, settings))
        session.finish(
            {"shared": shared_content(status)},
            shared_line(status),
            f"`expertctl federate serve` runs the rounds; the result becomes generalists/{name}",
        )
        return
    if (rounds, quorum, name) != (None, None, None):
        raise UserError(f"--rounds, --quorum and --name apply only to the recipes {' and '.join(OUTER_RECIPES)}")
    requests = coordinator_of(session).ask(names, recipe_from(**recipe), until)
    delivered = sorted(set(names) - {request.owner for request in requests})
    lines = [
        f"'{request.owner}' is asked until {request.deadline:%Y-%m-%d %H:%M} UTC: request {request.id}"
        for request in requests
    ]
    lines += [f"'{name}' has delivered an expert for this recipe" for name in delivered]
    session.finish(
        {
            "requests": [
                {"request": request.id, "owner": request.owner, "deadline": request.deadline.isoformat()}
                for request in requests
            ],
            "delivered": delivered,
        },
        *lines,
    )


def _plan_from(
    names: list[str],
    seconds: float,
    rounds: int,
    quorum: float,
    recipe_name: str,
    tokens: int | None,
    settings: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
    dp: str | None,
) -> tuple[RoundPlan, SharedSettings]:
    """Return plan and settings for the options; raises `UserError` for options that rounds do not support."""
    from ...core.hooks.options import parse_options
    from ...experts.federation.judging.round_weights import AveragingRules
    from ...experts.federation.rounds.rounds import RoundPlan
    from ...experts.federation.rounds.shared_model import SharedSettings

    if dp is not None:
        raise UserError(
            f"'{recipe_name}' does not support differential privacy, which would need accounting over all rounds; choose btm or flexolmo "
            "with --dp"
        )
    rules = parse_options(AveragingRules, as_dictionary(options), f"recipe '{recipe_name}'")
    plan = RoundPlan(tuple(names), recipe_name, quorum, seconds, rules)
    return plan, SharedSettings(rounds, training_from(tokens, settings))
