"""Model Breadcrumbs: drop the smallest and the largest elements of each task vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import PerExpert, TensorGroup
from ....core.hooks.option_checks import check_range
from ..arrays import kth_largest_magnitude, per_expert_values
from .changes import KEEP_ALL, ElementFilter, add_task_vectors


@dataclass(frozen=True)
class BreadcrumbsOptions:
    """Options of Model Breadcrumbs."""

    density: PerExpert = 0.9
    """Fraction of each task vector's elements that is kept."""
    gamma: PerExpert = 0.01
    """Fraction of the elements that is dropped as outliers, those of the largest magnitude."""
    lambda_: float = 1.0
    """Scaling factor of the merged task vector."""
    normalize: bool = False
    """Divide by the sum of the weights; with sign election, of the experts that have the elected sign."""

    def __post_init__(self) -> None:
        check_range("density", self.density, 0, 1)
        check_range("gamma", self.gamma, 0, 1)


def breadcrumbs(group: TensorGroup, options: BreadcrumbsOptions, *, elect: bool) -> Any:
    """Return the seed plus task vectors without small elements and outliers (arXiv:2312.06795, section 3).

    With `elect` signs are elected as in TIES (arXiv:2306.01708). Elements equal to a threshold are kept, so ties need
    no ordering.
    """
    settings = zip(per_expert_values(options.density, group), per_expert_values(options.gamma, group), strict=True)
    filters = [_band_filter(group, number, density, gamma) for number, (density, gamma) in enumerate(settings)]
    return add_task_vectors(group, filters, scaling=options.lambda_, normalize=options.normalize, elect=elect)


def _band_filter(group: TensorGroup, expert: int, density: float, gamma: float) -> ElementFilter:
    """Return the filter between both thresholds; `density` takes precedence over dropping outliers."""
    size = math.prod(group.seed.shape)
    count = int(density * size)
    if density >= 1 or size == 0:
        return KEEP_ALL
    if count == 0:
        return ElementFilter(min_magnitude=math.inf)
    outliers = min(int(gamma * size), size - count)
    vector = group.experts[expert]
    return ElementFilter(
        min_magnitude=kth_largest_magnitude(vector, min(outliers + count, size), group.seed),
        max_magnitude=kth_largest_magnitude(vector, outliers + 1, group.seed) if outliers else math.inf,
    )
