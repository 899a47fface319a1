"""Model Breadcrumbs: drop the smallest and the largest elements of each task vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import PerExpert, TensorGroup
from ....core.hooks.option_checks import check_range
from ..arrays import per_expert_values
from ..largest import kth_largest_magnitude
from .changes import KEEP_NONE, ElementFilter, add_task_vectors, density_filters


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
    gammas = per_expert_values(options.gamma, group)
    size = math.prod(group.seed.shape)

    def band(expert: int, density: float) -> ElementFilter:
        vector, count = group.experts[expert], int(density * size)
        if count == 0:
            return KEEP_NONE
        outliers = min(int(gammas[expert] * size), size - count)  # density takes precedence over dropping outliers
        return ElementFilter(
            min_magnitude=kth_largest_magnitude(vector, outliers + count, group.seed),
            max_magnitude=kth_largest_magnitude(vector, outliers + 1, group.seed) if outliers else math.inf,
        )

    filters = density_filters(group, options.density, band)
    return add_task_vectors(group, filters, scaling=options.lambda_, normalize=options.normalize, elect=elect)
