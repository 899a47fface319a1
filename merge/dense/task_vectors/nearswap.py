"""NearSwap: interpolate towards the expert, less where it differs more from the seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ....core.hooks.option_checks import check_at_least
from ..arrays import namespace

_EPSILON = 1e-6


@dataclass(frozen=True)
class NearswapOptions:
    """Options of NearSwap."""

    t: float = 1e-4
    """Absolute difference up to which the expert's value replaces the seed's."""

    def __post_init__(self) -> None:
        check_at_least("t", self.t, 0)


def nearswap(group: TensorGroup, options: NearswapOptions) -> Any:
    """Return w * expert + (1 - w) * seed with w = min(t / |expert - seed|, 1), element by element."""
    xp = namespace(group.seed)
    expert = group.experts[0]
    share = xp.clip(options.t / xp.clip(abs(group.seed - expert), _EPSILON, float("inf")), 0.0, 1.0)
    return share * expert + (1 - share) * group.seed
