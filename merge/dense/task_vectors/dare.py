"""DARE: drop changes at random and scale up the rest, so that experts get in each other's way less."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ....core.hooks.merging import PerExpert, TensorGroup
from ..arrays import Array, check_range, each, erase, pieces, random_mask
from .changes import EVERYTHING, Keep, add_task_vectors

Rescale = Literal["density", "l1", "none"]


@dataclass(frozen=True)
class DareOptions:
    """How much is dropped."""

    density: PerExpert = 0.5
    """Probability with which each element of a task vector is kept."""
    rescale: Rescale = "density"
    """`density`: kept elements times 1/density, as in the paper; `l1`: times what restores the sum of magnitudes, as
    mergekit does; `none`."""
    lambda_: float = 1.0
    """What the merged task vector is multiplied by."""
    normalize: bool = False
    """Divide by the sum of the weights (with sign election: of those that agree)."""
    random_seed: int = 0
    """Another seed drops other elements."""

    def __post_init__(self) -> None:
        check_range("density", self.density, 0, 1)


def dare_linear(group: TensorGroup, options: DareOptions) -> Any:
    """Return the sum of randomly thinned, rescaled task vectors on the seed (arXiv:2311.03099, section 3)."""
    return _dare(group, options, elect=False)


def dare_ties(group: TensorGroup, options: DareOptions) -> Any:
    """Return the same with TIES' election of signs (arXiv:2311.03099, section 4.3; arXiv:2306.01708)."""
    return _dare(group, options, elect=True)


def _dare(group: TensorGroup, options: DareOptions, *, elect: bool) -> Any:
    kept = [
        _thinned(group, number, density, options)
        for number, density in enumerate(each(options.density, group))
    ]
    return add_task_vectors(group, kept, scaling=options.lambda_, normalize=options.normalize, elect=elect)


def _thinned(group: TensorGroup, expert: int, density: float, options: DareOptions) -> Keep:
    if density >= 1:
        return EVERYTHING
    if density <= 0:
        return Keep(least=math.inf)
    mask = random_mask(group.seed, density, options.random_seed, group.name, group.expert_names[expert])
    return Keep(mask=mask, scale=rescaling(group, expert, mask, options.rescale, density))


def rescaling(group: TensorGroup, expert: int, mask: Array, rescale: Rescale, density: float) -> float:
    """Return what the kept elements of a task vector are multiplied by."""
    if rescale == "none" or density <= 0:
        return 1.0
    if rescale == "density":
        return 1 / density
    whole, kept = magnitudes(group.experts[expert], group.seed, mask)
    return whole / kept if whole > 1e-7 and kept > 1e-7 else 1.0


def magnitudes(expert: Array, seed: Array, mask: Array) -> tuple[float, float]:
    """Return the sum of magnitudes of a task vector, and of its kept elements, in float64."""
    whole = left = 0.0
    for one, base, kept in pieces(expert, seed, mask):
        vector = abs(one - base)
        whole += float(vector.sum())
        erase(vector, kept)
        left += float(vector.sum())
    return whole, left
