"""The blocks of one part of a run, drawn one after the other, and how far they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ....core.hooks.steps import TrainingObjective
from ....core.text.block_order import BalancedUnion, Position, cut, domain_at, draw
from ....core.text.token_store import Blocks, Row

ANNEALING_SEED = 500_009_777
"""Added to the seed of a run for its annealing, which so draws the blocks of a domain in an order of its own."""


@dataclass
class BlockStream:
    """Blocks in a pseudo-random order; the position is part of checkpoints."""

    blocks: Blocks | BalancedUnion
    seed: int
    domains: Sequence[int] | None = None
    """Number of each domain of the blocks among those of the run; None: they are those of the run, in order."""
    position: Position = field(default_factory=Position)

    @property
    def domain(self) -> int:
        """Number of the domain of the next block among those of the run."""
        number = domain_at(self.blocks, self.position)
        return number if self.domains is None else self.domains[number]

    def rows(self, objective: TrainingObjective, length: int | None = None) -> list[Row]:
        """Return the next block as an objective wants it, whole or in pieces of a length."""
        row = draw(self.blocks, self.position, self.seed)
        seeds = (self.seed, self.position.epoch, self.position.index)
        if length is None:
            return [objective.row(row, np.random.default_rng(seeds))]
        return [
            objective.row(piece, np.random.default_rng((*seeds, number)))
            for number, piece in enumerate(cut(row, length))
        ]

    def advance(self) -> None:
        """Go on to the next block."""
        self.position = self.position.advanced(1, len(self.blocks))
