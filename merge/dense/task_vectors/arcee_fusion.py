"""Arcee fusion: take over the changes that matter, by size and by how much they move a row's distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import Array, kth_largest_magnitude, namespace

_SMALLEST = 1e-8


@dataclass(frozen=True)
class ArceeFusionOptions:
    """Where the line is drawn."""

    spread: float = 1.5
    """How many interquartile ranges above the median importance has to be."""


def arcee_fusion(group: TensorGroup, options: ArceeFusionOptions) -> Any:
    """Return the seed with the expert's elements whose importance is at least median + spread * (Q3 - Q1).

    Importance is |expert - seed| times the divergence KL(softmax(expert row) || softmax(seed row)), as mergekit has
    it; its quantiles are exact here and sampled there.
    """
    importance = _importance(group.experts[0], group.seed)
    size = importance.reshape(-1).shape[0]
    lower, median, upper = (
        kth_largest_magnitude(importance, size - int(share * (size - 1))) for share in (0.25, 0.5, 0.75)
    )
    taken = importance >= median + options.spread * (upper - lower)
    return group.seed + (group.experts[0] - group.seed) * taken


def _importance(expert: Array, seed: Array) -> Array:
    xp = namespace(expert)
    if expert.ndim == 0:
        return abs(expert - seed)
    first, second = _softmax(expert) + _SMALLEST, _softmax(seed) + _SMALLEST
    divergence = xp.sum(first * xp.log(first / second), axis=-1, keepdims=True)
    return abs(expert - seed) * abs(divergence)


def _softmax(array: Array) -> Array:
    xp = namespace(array)
    raised = xp.exp(array - xp.max(array, axis=-1, keepdims=True))
    return raised / xp.sum(raised, axis=-1, keepdims=True)
