"""Arcee Fusion: keep the task vector elements of high importance, by magnitude and row KL divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import Array, namespace
from ..largest import kth_largest_magnitude

_EPSILON = 1e-8


@dataclass(frozen=True)
class ArceeFusionOptions:
    """Options of Arcee Fusion."""

    spread: float = 1.5
    """Importance threshold, in interquartile ranges above the median."""


def arcee_fusion(group: TensorGroup, options: ArceeFusionOptions) -> Any:
    """Return the seed with the expert's elements of importance at least median + spread * (Q3 - Q1).

    Importance is |expert - seed| times KL(softmax(expert row) || softmax(seed row)), as in mergekit.
    Quantiles are exact; mergekit samples them.
    """
    importance = _importance(group.experts[0], group.seed)
    size = importance.reshape(-1).shape[0]
    lower, median, upper = (
        kth_largest_magnitude(importance, size - int(share * (size - 1))) for share in (0.25, 0.5, 0.75)
    )
    is_kept = importance >= median + options.spread * (upper - lower)
    return group.seed + (group.experts[0] - group.seed) * is_kept


def _importance(expert: Array, seed: Array) -> Array:
    xp = namespace(expert)
    if expert.ndim == 0:
        return abs(expert - seed)
    first, second = _softmax(expert) + _EPSILON, _softmax(seed) + _EPSILON
    divergence = xp.sum(first * xp.log(first / second), axis=-1, keepdims=True)
    return abs(expert - seed) * abs(divergence)


def _softmax(array: Array) -> Array:
    xp = namespace(array)
    powers = xp.exp(array - xp.max(array, axis=-1, keepdims=True))
    return powers / xp.sum(powers, axis=-1, keepdims=True)
