"""What is planned for rounds of a shared model, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ....core.artefacts.files import read_json, write_json
from ....core.artefacts.layout import check_name
from ....core.errors import UserError
from .averaging import AveragingRules, outer_recipe

FORMAT = 1
PLAN_FILE = "plan.json"


def needed_of(quorum: float, owners: int) -> int:
    """Return how many of so many owners a share of them is, at least one."""
    return max(math.ceil(quorum * owners - 1e-9), 1)  # 0.7 of 10 are 7, whatever 0.7 is in binary


@dataclass(frozen=True)
class RoundPlan:
    """What does not change from round to round."""

    owners: tuple[str, ...]
    recipe: str
    """`diloco` or `fedavg`."""
    quorum: float = 1.0
    """Share of the owners without whom a round does not count."""
    round_seconds: float = 86_400.0
    """From the beginning of a round to its deadline."""
    rules: AveragingRules = field(default_factory=AveragingRules)

    def __post_init__(self) -> None:
        outer_recipe(self.recipe)
        if not self.owners or len(set(self.owners)) != len(self.owners):
            raise UserError("rounds need at least one owner, and each of them once")
        for owner in self.owners:
            check_name(owner, "an owner")
        if not 0 < self.quorum <= 1 or not self.round_seconds > 0:
            raise UserError("the quorum is a share between 0 and 1, and a round lasts more than 0 seconds")

    @property
    def needed(self) -> int:
        """Owners that must have delivered."""
        return needed_of(self.quorum, len(self.owners))


@dataclass(frozen=True)
class Delivery:
    """Weights of one owner that passed."""

    digest: str
    weight: float
    """Tokens that they were trained on."""
    change: float
    """How far they moved, as a share of the shared weights' length."""


@dataclass(frozen=True)
class RoundReport:
    """How one round ended."""

    number: int
    digest: str
    """Of the shared weights that came out."""
    shares: Mapping[str, float]
    """How much each owner counted."""
    refused: Mapping[str, str]
    """Why owners did not count."""
    missing: tuple[str, ...]
    """Owners who did not deliver."""


def write_plan(folder: Path, plan: RoundPlan, start: str) -> None:
    """Write a plan, with the digest of the weights that its first round starts from."""
    write_json(folder / PLAN_FILE, {"format": FORMAT, "start": start, "plan": asdict(plan)})


def read_plan(folder: Path) -> tuple[RoundPlan, str]:
    """Return what `write_plan` wrote; raises `UserError` for anything else."""
    path = folder / PLAN_FILE
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has format {content.get('format')}; this version reads {FORMAT}")
    try:
        plan = dict(content["plan"])
        rules = AveragingRules(**plan.pop("rules"))
        return RoundPlan(owners=tuple(plan.pop("owners")), rules=rules, **plan), content["start"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy") from None
