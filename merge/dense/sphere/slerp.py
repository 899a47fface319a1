"""SLERP: between two models along the arc instead of the chord."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import check_range, inner_products, weighted_sum

COLLINEAR = 0.9995
_SMALLEST_NORM = 1e-8


@dataclass(frozen=True)
class SlerpOptions:
    """How far along the arc."""

    t: float = 0.5
    """0 is the first model, 1 the second."""
    from_seed: bool = False
    """Go from the seed to the one expert, instead of from the first to the second of two."""

    def __post_init__(self) -> None:
        check_range("t", self.t, 0, 1)


def slerp(group: TensorGroup, options: SlerpOptions) -> Any:
    """Return sin((1-t)O)/sin(O) a + sin(tO)/sin(O) b, O being the angle between the flattened tensors a and b.

    Lengths are kept as they are; tensors that are nearly parallel are interpolated on the straight line (Shoemake,
    1985). Raises `ValueError` for another number of models than two.
    """
    ends = (group.seed, *group.experts) if options.from_seed else group.experts
    if len(ends) != 2:
        raise ValueError(
            f"slerp is between two models, and here are {len(ends)}; "
            + (
                "from_seed takes one expert"
                if options.from_seed
                else "give two experts, or one and from_seed"
            )
        )
    products = inner_products(ends)
    norms = [math.sqrt(products[number][number]) for number in (0, 1)]
    lengths = [norm if norm > _SMALLEST_NORM else 1.0 for norm in norms]
    cosine = max(-1.0, min(1.0, products[0][1] / (lengths[0] * lengths[1])))
    return weighted_sum(arc_coefficients(cosine, options.t, abs(cosine) > COLLINEAR), ends)


def arc_coefficients(cosine: float, t: float, straight: bool) -> tuple[float, float]:
    """Return what the two ends are multiplied by."""
    if straight:
        return 1 - t, t
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine
