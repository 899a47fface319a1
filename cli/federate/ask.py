"""`expertctl federate ask`: owners are asked for an expert each, or for rounds of one shared model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ...core.errors import UserError
from ..context import Session, pass_session
from ..group import cli_command
from ..parsing import as_dictionary
from .options import coordinator_of, recipe_from, with_recipe
from .shared import shared_content, shared_line

if TYPE_CHECKING:
    from ...experts.federation.rounds.round_plan import RoundPlan
    from ...experts.federation.rounds.shared_model import SharedSettings

ROUNDS, QUORUM, NAME = 10, 0.5, "shared"


@cli_command("ask", example="expertctl federate ask --experts site-a,site-b --recipe flexolmo --deadline 48h")
@click.option("--experts", "owners", required=True, metavar="NAME,...", help="The owners that are asked.")
@with_recipe
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"diloco, fedavg: rounds of the shared model. Default: {ROUNDS}",
)
@click.option(
    "--quorum",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help=f"diloco, fedavg: share of the owners that is enough when a round's deadline has passed. Default: {QUORUM}",
)
@click.option(
    "--name", metavar="NAME", help=f"diloco, fedavg: what the shared model is called. Default: {NAME}"
)
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
    """Ask owners for an expert each, or for rounds of one shared model.

    `serve` hands the requests to those who are there, now or later. Owners who have delivered for this seed and recipe are
    not asked again; a request that is open gets the later deadline. Asked again, the open round of a shared model gets its
    time once more, and owners who were left out of it may deliver after all.
    """
    from ...experts.federation.rounds.averaging import OUTER_RECIPES

    names = list(dict.fromkeys(one.strip() for one in owners.split(",") if one.strip()))
    if not names:
        raise UserError("--experts names nobody; write --experts site-a,site-b")
    if recipe["recipe_name"] in OUTER_RECIPES:
        _ask_for_rounds(session, names, deadline, rounds or ROUNDS, quorum or QUORUM, name or NAME, recipe)
        return
    if (rounds, quorum, name) != (None, None, None):
        raise UserError(f"--rounds, --quorum and --name belong to the recipes {' and '.join(OUTER_RECIPES)}")
    _ask_for_experts(session, names, deadline, recipe)


def _ask_for_experts(session: Session, names: list[str], deadline: str, recipe: dict[str, Any]) -> None:
    from datetime import UTC, datetime

    from ...experts.federation.protocol.requests import deadline_in

    asked = coordinator_of(session).ask(
        names, recipe_from(**recipe), deadline_in(deadline, datetime.now(UTC))
    )
    have = sorted(set(names) - {request.owner for request in asked})
    lines = [
        f"'{request.owner}' is asked until {request.deadline:%Y-%m-%d %H:%M} UTC: request {request.id}"
        for request in asked
    ]
    lines += [f"'{name}' has delivered what this recipe asks for" for name in have]
    session.finish(
        {
            "requests": [
                {"request": request.id, "owner": request.owner, "deadline": request.deadline.isoformat()}
                for request in asked
            ],
            "delivered": have,
        },
        *lines,
    )


def _ask_for_rounds(
    session: Session,
    names: list[str],
    deadline: str,
    rounds: int,
    quorum: float,
    name: str,
    recipe: dict[str, Any],
) -> None:
    from ...experts.federation.coordinator.round_keeper import begin_rounds, status_of

    coordinator = coordinator_of(session)
    plan, settings = _rounds_from(names, deadline, rounds, quorum, recipe)
    found = status_of(coordinator, begin_rounds(coordinator, name, plan, settings))
    session.finish(
        {"shared": shared_content(found)},
        shared_line(found),
        f"`expertctl federate serve` moves it on; the last round becomes generalists/{name}",
    )


def _rounds_from(
    names: list[str], deadline: str, rounds: int, quorum: float, recipe: dict[str, Any]
) -> tuple[RoundPlan, SharedSettings]:
    """Return what the options describe; raises `UserError` for those that no round has."""
    from datetime import UTC, datetime

    from ...core.hooks.options import parse_options
    from ...experts.federation.protocol.requests import deadline_in
    from ...experts.federation.rounds.averaging import AveragingRules
    from ...experts.federation.rounds.round_plan import RoundPlan
    from ...experts.federation.rounds.shared_model import SharedSettings

    kind = recipe["recipe_name"]
    if recipe["dp"] is not None:
        raise UserError(
            f"'{kind}' has no differential privacy: the noise of all rounds would have to be counted together; ask for btm or "
            "flexolmo with --dp"
        )
    tokens = {"tokens": recipe["tokens"]} if recipe["tokens"] is not None else {}
    training = as_dictionary((*recipe["settings"], *tokens.items()))
    rules = parse_options(AveragingRules, as_dictionary(recipe["options"]), f"recipe '{kind}'")
    now = datetime.now(UTC)
    seconds = (deadline_in(deadline, now) - now).total_seconds()
    return RoundPlan(tuple(names), kind, quorum, seconds, rules), SharedSettings(rounds, training)
