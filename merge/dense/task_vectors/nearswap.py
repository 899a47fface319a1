"""NearSwap: take the expert's value where it is near the seed's, and less of it the further away it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import namespace

_SMALLEST = 1e-6


@dataclass(frozen=True)
class NearswapOptions:
    """How near is near."""

    t: float = 1e-4
    """Difference up to which the expert's value is taken whole; in the size of the weights."""

    def __post_init__(self) -> None:
        if self.t < 0:
            raise ValueError(f"t is {self.t}; it is 0 or more")


def nearswap(group: TensorGroup, options: NearswapOptions) -> Any:
    """Return w * expert + (1 - w) * seed with w = min(t / |expert - seed|, 1), element by element."""
    xp = namespace(group.seed)
    expert = group.experts[0]
    share = xp.clip(options.t / xp.clip(abs(group.seed - expert), _SMALLEST, float("inf")), 0.0, 1.0)
    return share * expert + (1 - share) * group.seed
