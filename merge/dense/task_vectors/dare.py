"""DARE: drop elements of task vectors at random and rescale the rest to reduce interference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ....core.hooks.merging import PerExpert, TensorGroup
from ....core.hooks.option_checks import check_range
from ..arrays import Array, chunks, random_mask, zero_unkept
from .changes import ElementFilter, add_task_vectors, density_filters

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


def dare(group: TensorGroup, options: DareOptions, *, elect: bool) -> Any:
    """Return the seed plus randomly sparsified, rescaled task vectors (arXiv:2311.03099, section 3).

    With `elect` signs are elected as in TIES (arXiv:2311.03099, section 4.3; arXiv:2306.01708).
    """

    def sample(expert: int, density: float) -> ElementFilter:
        mask = random_mask(group.seed, density, options.random_seed, group.name, group.expert_names[expert])
        return ElementFilter(mask=mask, scale=rescale_factor(group, expert, mask, options.rescale, density))

    filters = density_filters(group, options.density, sample)
    return add_task_vectors(group, filters, scaling=options.lambda_, normalize=options.normalize, elect=elect)


def rescale_factor(group: TensorGroup, expert: int, mask: Array, rescale: Rescale, density: float) -> float:
    """Return the factor applied to the kept elements of a task vector; L1 norms are accumulated in float64."""
    if rescale == "none":
        return 1.0
    if rescale == "density":
        return 1 / density
    total = kept_total = 0.0
    for expert_chunk, seed_chunk, mask_chunk in chunks(group.experts[expert], group.seed, mask):
        vector = abs(expert_chunk - seed_chunk)
        total += float(vector.sum())
        zero_unkept(vector, mask_chunk)
        kept_total += float(vector.sum())
    return total / kept_total if total > 1e-7 and kept_total > 1e-7 else 1.0
