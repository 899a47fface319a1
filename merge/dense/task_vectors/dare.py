"""DARE: drop elements of task vectors at random and rescale the rest to reduce interference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ....core.hooks.merging import PerExpert, TensorGroup
from ..arrays import Array, check_range, chunks, per_expert_values, random_mask, zero_unkept
from .changes import KEEP_ALL, ElementFilter, add_task_vectors

Rescale = Literal["density", "l1", "none"]


@dataclass(frozen=True)
class DareOptions:
    """Options of DARE."""

    density: PerExpert = 0.5
    """Probability that an element of a task vector is kept."""
    rescale: Rescale = "density"
    """Rescaling of the kept elements: `density` multiplies by 1/density, as in the paper; `l1` restores the
    L1 norm of the task vector, as in mergekit; `none`."""
    lambda_: float = 1.0
    """Scaling factor of the merged task vector."""
    normalize: bool = False
    """Divide by the sum of the weights; with sign election, of the experts that have the elected sign."""
    random_seed: int = 0
    """Seed of the random masks."""

    def __post_init__(self) -> None:
        check_range("density", self.density, 0, 1)


def dare_linear(group: TensorGroup, options: DareOptions) -> Any:
    """Return the seed plus randomly sparsified, rescaled task vectors (arXiv:2311.03099, section 3)."""
    return _dare(group, options, elect=False)


def dare_ties(group: TensorGroup, options: DareOptions) -> Any:
    """Return `dare_linear` with TIES sign election (arXiv:2311.03099, section 4.3; arXiv:2306.01708)."""
    return _dare(group, options, elect=True)


def _dare(group: TensorGroup, options: DareOptions, *, elect: bool) -> Any:
    filters = [
        _random_filter(group, number, density, options)
        for number, density in enumerate(per_expert_values(options.density, group))
    ]
    return add_task_vectors(group, filters, scaling=options.lambda_, normalize=options.normalize, elect=elect)


def _random_filter(group: TensorGroup, expert: int, density: float, options: DareOptions) -> ElementFilter:
    if density >= 1:
        return KEEP_ALL
    if density <= 0:
        return ElementFilter(min_magnitude=math.inf)
    mask = random_mask(group.seed, density, options.random_seed, group.name, group.expert_names[expert])
    return ElementFilter(mask=mask, scale=rescale_factor(group, expert, mask, options.rescale, density))


def rescale_factor(group: TensorGroup, expert: int, mask: Array, rescale: Rescale, density: float) -> float:
    """Return the factor applied to the kept elements of a task vector."""
    if rescale == "none" or density <= 0:
        return 1.0
    if rescale == "density":
        return 1 / density
    total, kept_total = l1_norms(group.experts[expert], group.seed, mask)
    return total / kept_total if total > 1e-7 and kept_total > 1e-7 else 1.0


def l1_norms(expert: Array, seed: Array, mask: Array) -> tuple[float, float]:
    """Return the L1 norms of a task vector and of its masked elements, accumulated in float64."""
    total = kept_total = 0.0
    for expert_chunk, seed_chunk, mask_chunk in chunks(expert, seed, mask):
        vector = abs(expert_chunk - seed_chunk)
        total += float(vector.sum())
        zero_unkept(vector, mask_chunk)
        kept_total += float(vector.sum())
    return total, kept_total
