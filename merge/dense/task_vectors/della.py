"""DELLA: drop elements of task vectors at random, small magnitudes of a row more often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import PerExpert, TensorGroup
from ....core.hooks.option_checks import check_range
from ..arrays import Array, is_numpy, per_expert_values, random_mask
from .changes import ElementFilter, add_task_vectors, density_filters
from .dare import Rescale, rescale_factor


@dataclass(frozen=True)
class DellaOptions:
    """Options of DELLA."""

    density: PerExpert = 0.5
    """Mean probability that an element of a row is kept."""
    epsilon: PerExpert = 0.15
    """Half-range of the keep probability: density - epsilon for the smallest magnitude of a row, density +
    epsilon for the largest."""
    rescale: Rescale = "density"
    """Rescaling of the kept elements: `density` divides by their keep probability, as in the paper; `l1`
    restores the L1 norm of the task vector, as in mergekit; `none`."""
    lambda_: float = 1.0
    """Scaling factor of the merged task vector."""
    normalize: bool = True
    """Divide by the sum of the weights; with sign election, of the experts that have the elected sign."""
    random_seed: int = 0
    """Seed of the random masks."""

    def __post_init__(self) -> None:
        check_range("density", self.density, 0, 1)
        check_range("epsilon", self.epsilon, 0, 0.5)
        pair = [self.density, self.epsilon]
        count = max((len(option) for option in pair if isinstance(option, tuple)), default=1)
        densities, epsilons = ((option if isinstance(option, tuple) else (option,) * count) for option in pair)
        for density, epsilon in zip(densities, epsilons, strict=True):
            if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                raise ValueError(
                    f"density {density} and epsilon {epsilon} give probabilities outside the range 0 to 1; "
                    "choose a smaller epsilon"
                )


def della(group: TensorGroup, options: DellaOptions, *, elect: bool) -> Any:
    """Return the seed plus sampled task vectors, with `elect` their disjoint mean (arXiv:2406.11617, section 3)."""
    epsilons = per_expert_values(options.epsilon, group)

    def sample(expert: int, density: float) -> ElementFilter:
        probabilities = keep_probabilities(abs(group.experts[expert] - group.seed), density, epsilons[expert])
        name = group.expert_names[expert]
        mask = random_mask(group.seed, probabilities, options.random_seed, group.name, name)
        if options.rescale == "density":
            return ElementFilter(mask=mask, scale=1 / probabilities)
        return ElementFilter(mask=mask, scale=rescale_factor(group, expert, mask, options.rescale, density))

    filters = density_filters(group, options.density, sample)
    return add_task_vectors(group, filters, scaling=options.lambda_, normalize=options.normalize, elect=elect)


def keep_probabilities(magnitudes: Array, density: float, epsilon: float) -> Array:
    """Return keep probabilities, which rise linearly with the rank of a magnitude in its row.

    Tensors of fewer than two dimensions are one row; equal magnitudes are ranked by position.
    """
    rows = magnitudes.reshape(magnitudes.shape[0], -1) if magnitudes.ndim > 1 else magnitudes.reshape(1, -1)
    width = rows.shape[1]
    if is_numpy(rows):
        import numpy as np

        order = np.argsort(rows, axis=1, kind="stable")
        ranks = np.empty_like(rows)
        np.put_along_axis(ranks, order, np.arange(width, dtype=rows.dtype)[None], axis=1)
    else:
        import torch

        indices = torch.argsort(rows, dim=1, stable=True)
        positions = torch.arange(width, dtype=rows.dtype, device=rows.device).expand_as(rows)
        ranks = torch.empty_like(rows).scatter_(1, indices, positions)
    probabilities = (density - epsilon) + ranks * (2 * epsilon / max(width - 1, 1))
    return probabilities.reshape(magnitudes.shape)
