"""DELLA: drop changes at random, the small ones of each row more often than the large ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import PerExpert, TensorGroup
from ..arrays import Array, check_range, each, is_numpy, namespace, random_mask
from .changes import EVERYTHING, Keep, add_task_vectors
from .dare import Rescale, rescaling


@dataclass(frozen=True)
class DellaOptions:
    """How much is dropped, and how unevenly."""

    density: PerExpert = 0.5
    """Probability with which elements are kept, on average over a row."""
    epsilon: PerExpert = 0.15
    """Probabilities run from density - epsilon for a row's smallest change to density + epsilon for its largest."""
    rescale: Rescale = "density"
    """`density`: kept elements over their own probability, as in the paper; `l1`: times what restores the sum of
    magnitudes, as mergekit does; `none`."""
    lambda_: float = 1.0
    """What the merged task vector is multiplied by."""
    normalize: bool = True
    """Divide by the sum of the weights (with sign election: of those that agree)."""
    random_seed: int = 0
    """Another seed drops other elements."""

    def __post_init__(self) -> None:
        check_range("density", self.density, 0, 1)
        check_range("epsilon", self.epsilon, 0, 0.5)
        pairs = [self.density, self.epsilon]
        count = max((len(one) for one in pairs if isinstance(one, tuple)), default=1)
        densities, epsilons = ((one if isinstance(one, tuple) else (one,) * count) for one in pairs)
        for density, epsilon in zip(densities, epsilons, strict=True):
            if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
                raise ValueError(
                    f"density {density} and epsilon {epsilon} give probabilities outside of 0 to 1; choose a smaller "
                    "epsilon"
                )


def della(group: TensorGroup, options: DellaOptions) -> Any:
    """Return the disjoint mean of task vectors thinned by magnitude, on the seed (arXiv:2406.11617, section 3)."""
    return _della(group, options, elect=True)


def della_linear(group: TensorGroup, options: DellaOptions) -> Any:
    """Return the same without an election of signs."""
    return _della(group, options, elect=False)


def _della(group: TensorGroup, options: DellaOptions, *, elect: bool) -> Any:
    settings = zip(each(options.density, group), each(options.epsilon, group), strict=True)
    kept = [
        _thinned(group, number, density, epsilon, options)
        for number, (density, epsilon) in enumerate(settings)
    ]
    return add_task_vectors(group, kept, scaling=options.lambda_, normalize=options.normalize, elect=elect)


def _thinned(group: TensorGroup, expert: int, density: float, epsilon: float, options: DellaOptions) -> Keep:
    if density >= 1:
        return EVERYTHING
    xp = namespace(group.seed)
    if density <= 0:
        return Keep(mask=xp.zeros_like(group.seed, dtype=xp.bool))
    chances = keep_probabilities(abs(group.experts[expert] - group.seed), density, epsilon)
    name = group.expert_names[expert]
    mask = random_mask(group.seed, chances, options.random_seed, group.name, name)
    if options.rescale == "density":
        return Keep(mask=mask, scale=1 / chances)
    return Keep(mask=mask, scale=rescaling(group, expert, mask, options.rescale, density))


def keep_probabilities(magnitudes: Array, density: float, epsilon: float) -> Array:
    """Return for each element its probability of being kept: rising evenly with its rank in its row.

    Tensors of fewer than two dimensions are one row; equal magnitudes rank in their order.
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

        by_size = torch.argsort(rows, dim=1, stable=True)
        places = torch.arange(width, dtype=rows.dtype, device=rows.device).expand_as(rows)
        ranks = torch.empty_like(rows).scatter_(1, by_size, places)
    chances = (density - epsilon) + ranks * (2 * epsilon / max(width - 1, 1))
    return chances.reshape(magnitudes.shape)
