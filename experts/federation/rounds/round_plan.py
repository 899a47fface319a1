"""Plan and reports of the rounds of a shared model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ....core.artefacts.layout import check_name
from ....core.errors import UserError
from ..judging.round_weights import AveragingRules
from .averaging import outer_recipe


def quorum_size(quorum: float, owners: int) -> int:
    """Return the number of owners that a share of them amounts to, rounded up, at least 1."""
    return max(math.ceil(quorum * owners - 1e-9), 1)  # 0.7 * 10 is 7 despite binary rounding


@dataclass(frozen=True)
class RoundPlan:
    """Settings that are the same for all rounds."""

    owners: tuple[str, ...]
    recipe: str
    """`diloco` or `fedavg`."""
    quorum: float = 1.0
    """Share of the owners that a round needs."""
    round_seconds: float = 86_400.0
    """Seconds from the start of a round to its deadline."""
    rules: AveragingRules = field(default_factory=AveragingRules)

    def __post_init__(self) -> None:
        outer_recipe(self.recipe)
        if not self.owners or len(set(self.owners)) != len(self.owners):
            raise UserError("rounds need at least one owner, and no owner twice")
        for owner in self.owners:
            check_name(owner, "an owner")
        if not 0 < self.quorum <= 1 or not self.round_seconds > 0:
            raise UserError("the quorum must be a share between 0 and 1, and a round longer than 0 seconds")

    @property
    def needed(self) -> int:
        """Number of owners that must deliver."""
        return quorum_size(self.quorum, len(self.owners))


@dataclass(frozen=True)
class RoundReport:
    """Result of one round."""

    number: int
    digest: str
    """Digest of the shared weights after the round."""
    shares: Mapping[str, float]
    """Weight of each owner in the average; sums to 1."""
    refused: Mapping[str, str]
    """Reason of each refusal, by owner."""
    missing: tuple[str, ...]
    """Owners who did not deliver."""
