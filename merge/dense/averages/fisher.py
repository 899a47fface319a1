"""Fisher merging: every element from the experts whose predictions depend on it most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import Array, in_pieces, namespace


@dataclass(frozen=True)
class FisherOptions:
    """How the information counts."""

    floor: float = 1e-6
    """Smallest information of an element, so that nothing is divided by zero."""
    normalize_fisher: bool = False
    """Divide each expert's information by its length, so that experts with steep losses do not decide everything."""

    def __post_init__(self) -> None:
        if self.floor <= 0:
            raise ValueError(f"floor is {self.floor}; it is more than 0")


def fisher(group: TensorGroup, options: FisherOptions) -> Any:
    """Return sum_i w_i F_i theta_i / sum_i w_i F_i, F_i the diagonal Fisher information (arXiv:2111.09832, section 3).

    Tensors that no expert has information on are averaged by weight.
    """
    known = [one for one in group.statistics if one is not None]
    if len(known) < len(group.experts):
        known = []
    scales = [_scale(one, options) for one in known]

    def piece(*parts: Array) -> Array:
        experts, information = parts[: len(group.experts)], parts[len(group.experts) :]
        xp = namespace(experts[0])
        mix, divisor = xp.zeros_like(experts[0]), xp.zeros_like(experts[0])
        for number, (expert, weight) in enumerate(zip(experts, group.weights, strict=True)):
            counts = xp.ones_like(expert)
            if information:
                counts = xp.clip(information[number] * scales[number], options.floor, math.inf)
            counts = counts * weight
            mix += counts * expert
            divisor += counts
        return mix / divisor

    return in_pieces(piece, *group.experts, *known)


def _scale(information: Array, options: FisherOptions) -> float:
    if not options.normalize_fisher:
        return 1.0
    length = math.sqrt(float((information * information).sum()))
    return 1 / length if length > 0 else 1.0
