"""SLERP: spherical linear interpolation between two models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ....core.hooks.option_checks import check_range
from ..arrays import inner_products, weighted_sum

COLLINEAR = 0.9995
"""Absolute cosine above which two tensors are interpolated linearly."""
_SMALLEST_NORM = 1e-8


@dataclass(frozen=True)
class SlerpOptions:
    """Options of SLERP."""

    t: float = 0.5
    """Interpolation parameter; 0 is the first model, 1 the second."""
    from_seed: bool = False
    """Interpolate from the seed to a single expert instead of between two experts."""

    def __post_init__(self) -> None:
        check_range("t", self.t, 0, 1)


def slerp(group: TensorGroup, options: SlerpOptions) -> Any:
    """Return sin((1-t)O)/sin(O) a + sin(tO)/sin(O) b, O the angle between the flattened tensors a and b.

    The tensors are not normalized; nearly parallel tensors are interpolated linearly (Shoemake, 1985). Raises
    `ValueError` unless there are exactly two models.
    """
    endpoints = (group.seed, *group.experts) if options.from_seed else group.experts
    if len(endpoints) != 2:
        raise ValueError(
            f"slerp interpolates two models, and {len(endpoints)} are given; "
            + (
                "give one expert with from_seed"
                if options.from_seed
                else "give two experts, or one expert and from_seed"
            )
        )
    products = inner_products(endpoints)
    norms = [math.sqrt(products[number][number]) for number in (0, 1)]
    divisors = [norm if norm > _SMALLEST_NORM else 1.0 for norm in norms]
    cosine = max(-1.0, min(1.0, products[0][1] / (divisors[0] * divisors[1])))
    return weighted_sum(arc_coefficients(cosine, options.t, abs(cosine) > COLLINEAR), endpoints)


def arc_coefficients(cosine: float, t: float, is_parallel: bool) -> tuple[float, float]:
    """Return the coefficients of the two endpoints."""
    if is_parallel:
        return 1 - t, t
    angle = math.acos(cosine)
    sine = math.sin(angle)
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine
