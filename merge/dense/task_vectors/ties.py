"""TIES: trim small elements of task vectors, elect a sign per element, average the values of that sign."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import PerExpert, TensorGroup
from ....core.hooks.option_checks import check_range
from ..arrays import kth_largest_magnitude, per_expert_values
from .changes import KEEP_ALL, ElementFilter, add_task_vectors


@dataclass(frozen=True)
class TiesOptions:
    """Options of TIES."""

    density: PerExpert = 0.2
    """Fraction of each task vector's elements that is kept, largest magnitude first; 0.2 in the paper."""
    lambda_: float = 1.0
    """Scaling factor of the merged task vector."""
    normalize: bool = True
    """Divide by the sum of the weights of the experts that agree with the elected sign (disjoint mean)."""

    def __post_init__(self) -> None:
        check_range("density", self.density, 0, 1)


def ties(group: TensorGroup, options: TiesOptions) -> Any:
    """Return seed + lambda * the disjoint mean of trimmed task vectors (arXiv:2306.01708, section 4).

    Task vectors are trimmed per tensor and expert. Elements equal to the threshold are kept, so ties need no
    ordering.
    """
    densities = per_expert_values(options.density, group)
    filters = [_magnitude_filter(group, number, density) for number, density in enumerate(densities)]
    return add_task_vectors(group, filters, scaling=options.lambda_, normalize=options.normalize, elect=True)


def _magnitude_filter(group: TensorGroup, expert: int, density: float) -> ElementFilter:
    """Return the filter that keeps the largest fraction `density` of a task vector, at least one element."""
    size = math.prod(group.seed.shape)
    if density >= 1 or size == 0:
        return KEEP_ALL
    if density <= 0:
        return ElementFilter(min_magnitude=math.inf)
    count = max(1, int(density * size))
    return ElementFilter(min_magnitude=kth_largest_magnitude(group.experts[expert], count, group.seed))
