"""The settings of a simulated federation."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from ....core.errors import UserError


@dataclass(frozen=True)
class Plan:
    """What is asked of owners, and what the coordinator has."""

    expert_bytes: int = 2_000_000_000
    """What an owner hands in."""
    seed_bytes: int = 2_000_000_000
    """What an owner fetches; 0 where all have the seed already."""
    tokens: int = 100_000_000
    """What an owner trains on."""
    deadline: timedelta = timedelta(hours=48)
    quorum: float = 0.8
    """Share of the owners whose experts are enough."""
    line_gbit: float = 10.0
    """Gbit/s of the coordinator's line, in each direction."""
    ask_again: int = 0
    """Times that missing owners are asked again, for as long, when the deadline passes without the quorum."""
    checkpoint_seconds: float = 60.0
    """Between an owner's checkpoints."""
    seed: int = 0
    """Of whatever happens by chance."""

    def __post_init__(self) -> None:
        if not 0 < self.quorum <= 1:
            raise UserError(f"the quorum is a share between 0 and 1, not {self.quorum:g}")
        if min(self.tokens, self.line_gbit, self.deadline.total_seconds(), self.checkpoint_seconds) <= 0:
            raise UserError("tokens, the coordinator's line and the deadline have to be more than 0")
        if min(self.expert_bytes, self.seed_bytes, self.ask_again) < 0:
            raise UserError("sizes, and the times that owners are asked again, have to be 0 or more")
