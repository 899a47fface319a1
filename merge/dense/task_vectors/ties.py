"""TIES: trim small elements of task vectors, elect a sign per element, average the values of that sign."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import PerExpert, TensorGroup
from ....core.hooks.option_checks import check_range
from ..arrays import kth_largest_magnitude
from .changes import ElementFilter, add_task_vectors, density_filters


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

    Task vectors are trimmed per tensor and expert. Elements equal to the threshold are kept, so ties need no ordering.
    """

    def trim(expert: int, density: float) -> ElementFilter:
        count = max(1, int(density * math.prod(group.seed.shape)))
        return ElementFilter(min_magnitude=kth_largest_magnitude(group.experts[expert], count, group.seed))

    filters = density_filters(group, options.density, trim)
    return add_task_vectors(group, filters, scaling=options.lambda_, normalize=options.normalize, elect=True)
