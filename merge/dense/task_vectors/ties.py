"""TIES: trim small changes, elect a sign for every element, average what agrees with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import PerExpert, TensorGroup
from ..arrays import check_range, each, kth_largest_magnitude
from .changes import EVERYTHING, Keep, add_task_vectors


@dataclass(frozen=True)
class TiesOptions:
    """How much is trimmed."""

    density: PerExpert = 0.2
    """Share of each task vector's elements that is kept, those of the largest magnitude; 0.2 in the paper."""
    lambda_: float = 1.0
    """What the merged task vector is multiplied by."""
    normalize: bool = True
    """Divide by the weights of the experts that agree: the paper's disjoint mean."""

    def __post_init__(self) -> None:
        check_range("density", self.density, 0, 1)


def ties(group: TensorGroup, options: TiesOptions) -> Any:
    """Return seed + lambda * the disjoint mean of trimmed task vectors (arXiv:2306.01708, section 4).

    Trimming is per tensor and expert; elements as large as the smallest that is kept are kept too, so that no order
    among equals is needed.
    """
    kept = [
        keep_largest(group, number, density) for number, density in enumerate(each(options.density, group))
    ]
    return add_task_vectors(group, kept, scaling=options.lambda_, normalize=options.normalize, elect=True)


def keep_largest(group: TensorGroup, expert: int, density: float) -> Keep:
    """Return the threshold that keeps a share of one task vector's elements, at least one."""
    size = math.prod(group.seed.shape)
    if density >= 1 or size == 0:
        return EVERYTHING
    if density <= 0:
        return Keep(least=math.inf)
    count = max(1, int(density * size))
    return Keep(least=kth_largest_magnitude(group.experts[expert], count, group.seed))
