"""Fisher merging: average each parameter weighted by its Fisher information in each expert."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ....core.hooks.option_checks import check_positive
from ..arrays import Array, map_chunks, namespace


@dataclass(frozen=True)
class FisherOptions:
    """Options of Fisher merging."""

    floor: float = 1e-6
    """Lower bound of the Fisher information of an element; prevents division by zero."""
    normalize_fisher: bool = False
    """Divide each expert's Fisher information by its L2 norm, so that steep losses do not dominate."""

    def __post_init__(self) -> None:
        check_positive("floor", self.floor)


def fisher(group: TensorGroup, options: FisherOptions) -> Any:
    """Return sum_i w_i F_i theta_i / sum_i w_i F_i, F_i the diagonal Fisher (arXiv:2111.09832, section 3).

    A tensor for which any expert lacks Fisher information is averaged by weight.
    """
    fishers = [fisher for fisher in group.statistics if fisher is not None]
    if len(fishers) < len(group.experts):
        fishers = []
    scales = [_scale(fisher, options) for fisher in fishers]

    def merge_chunk(*parts: Array) -> Array:
        experts, information = parts[: len(group.experts)], parts[len(group.experts) :]
        xp = namespace(experts[0])
        mix, divisor = xp.zeros_like(experts[0]), xp.zeros_like(experts[0])
        for number, (expert, weight) in enumerate(zip(experts, group.weights, strict=True)):
            importance = xp.ones_like(expert)
            if information:
                importance = xp.clip(information[number] * scales[number], options.floor, math.inf)
            importance = importance * weight
            mix += importance * expert
            divisor += importance
        return mix / divisor

    return map_chunks(merge_chunk, *group.experts, *fishers)


def _scale(information: Array, options: FisherOptions) -> float:
    if not options.normalize_fisher:
        return 1.0
    norm = math.sqrt(float((information * information).sum()))
    return 1 / norm if norm > 0 else 1.0
