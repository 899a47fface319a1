"""Model Breadcrumbs: drop the smallest changes and, as outliers, the largest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import PerExpert, TensorGroup
from ..arrays import check_range, each, kth_largest_magnitude
from .changes import EVERYTHING, Keep, add_task_vectors


@dataclass(frozen=True)
class BreadcrumbsOptions:
    """What is dropped on either side."""

    density: PerExpert = 0.9
    """Share of each task vector's elements that is kept."""
    gamma: PerExpert = 0.01
    """Share of the elements, those of the largest magnitude, that is dropped as outliers."""
    lambda_: float = 1.0
    """What the merged task vector is multiplied by."""
    normalize: bool = False
    """Divide by the sum of the weights (with sign election: of those that agree)."""

    def __post_init__(self) -> None:
        check_range("density", self.density, 0, 1)
        check_range("gamma", self.gamma, 0, 1)


def breadcrumbs(group: TensorGroup, options: BreadcrumbsOptions) -> Any:
    """Return the sum of task vectors without small changes and outliers, on the seed (arXiv:2312.06795, section 3).

    Elements as large as a threshold are kept, so that no order among equals is needed.
    """
    return _breadcrumbs(group, options, elect=False)


def breadcrumbs_ties(group: TensorGroup, options: BreadcrumbsOptions) -> Any:
    """Return the same with TIES' election of signs (arXiv:2306.01708)."""
    return _breadcrumbs(group, options, elect=True)


def _breadcrumbs(group: TensorGroup, options: BreadcrumbsOptions, *, elect: bool) -> Any:
    settings = zip(each(options.density, group), each(options.gamma, group), strict=True)
    kept = [_middle(group, number, density, gamma) for number, (density, gamma) in enumerate(settings)]
    return add_task_vectors(group, kept, scaling=options.lambda_, normalize=options.normalize, elect=elect)


def _middle(group: TensorGroup, expert: int, density: float, gamma: float) -> Keep:
    """Return the two thresholds; fewer outliers are dropped where density leaves no room for more."""
    size = math.prod(group.seed.shape)
    wanted = int(density * size)
    if density >= 1 or size == 0:
        return EVERYTHING
    if wanted == 0:
        return Keep(least=math.inf)
    outliers = min(int(gamma * size), size - wanted)
    vector = group.experts[expert]
    return Keep(
        least=kth_largest_magnitude(vector, min(outliers + wanted, size), group.seed),
        most=kth_largest_magnitude(vector, outliers + 1, group.seed) if outliers else math.inf,
    )
