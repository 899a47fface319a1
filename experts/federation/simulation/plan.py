"""The settings of a simulated federation."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from ....core.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Request, coordinator and random seed of a simulated federation."""

    expert_bytes: int = 2_000_000_000
    """Size of an expert, in bytes."""
    seed_bytes: int = 2_000_000_000
    """Size of the seed, in bytes; 0 if all owners have it."""
    tokens: int = 100_000_000
    """Tokens that each owner trains on."""
    deadline: timedelta = timedelta(hours=48)
    quorum: float = 0.8
    """Share of the owners that the federation needs."""
    line_gbit: float = 10.0
    """Bandwidth of the coordinator's line in each direction, Gbit/s."""
    ask_again: int = 0
    """Times that missing owners are asked again, with the same time limit, when the deadline passes without the quorum."""
    checkpoint_seconds: float = 60.0
    """Seconds between an owner's checkpoints."""
    seed: int = 0
    """Random seed."""

    def __post_init__(self) -> None:
        if not 0 < self.quorum <= 1:
            raise UserError(f"the quorum must be a share between 0 and 1, not {self.quorum:g}")
        if min(self.tokens, self.line_gbit, self.deadline.total_seconds(), self.checkpoint_seconds) <= 0:
            raise UserError(
                "tokens, the coordinator's line, the deadline and the time between checkpoints must be more than 0"
            )
        if min(self.expert_bytes, self.seed_bytes, self.ask_again) < 0:
            raise UserError("sizes and the number of repeated requests must be 0 or more")
