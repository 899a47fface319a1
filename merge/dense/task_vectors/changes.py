"""Adding what experts learned to the seed: the part that all methods on task vectors have in common.

A task vector is an expert minus the seed. Methods differ in which of its elements they keep (`Keep`), and in whether
experts that disagree in sign cancel each other or one side wins (`elect`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import Array, as_numbers, erase, in_pieces, namespace


@dataclass(frozen=True)
class Keep:
    """Which elements of one task vector count, and how much."""

    least: float = 0.0
    """Smallest magnitude that is kept."""
    most: float = math.inf
    """Largest magnitude that is kept."""
    mask: Array | None = None
    """True where an element is kept."""
    scale: Array | float = 1.0
    """What the kept ones are multiplied by."""


EVERYTHING = Keep()


def add_task_vectors(
    group: TensorGroup, kept: Sequence[Keep], *, scaling: float, normalize: bool, elect: bool
) -> Any:
    """Return seed + scaling * mix, where mix is the weighted sum of the kept task vectors.

    With `normalize` it is divided by the weights that take part. With `elect` only elements count whose weighted
    sign is that of their sum over the experts (0 counts as +): TIES (arXiv:2306.01708, section 4).
    """
    extra = [
        array
        for keep in kept
        for array in (keep.mask, keep.scale)
        if array is not None and not isinstance(array, float | int)
    ]
    total = sum(group.weights)

    def piece(seed: Array, *rest: Array) -> Array:
        parts = iter(rest[len(group.experts) :])
        vectors = [
            _weighted(_kept_vector(expert - seed, keep, parts), weight)
            for expert, keep, weight in zip(rest, kept, group.weights, strict=False)
        ]
        if elect:
            mix = _elected(vectors, group.weights, normalize)
        else:
            mix = vectors[0]
            for vector in vectors[1:]:
                mix += vector
            if normalize and abs(total) >= 1e-8:
                mix /= total
        if scaling != 1:
            mix *= scaling
        mix += seed
        return mix

    return in_pieces(piece, group.seed, *group.experts, *extra)


def _kept_vector(vector: Array, keep: Keep, parts: Any) -> Array:
    """Return a task vector with 0 where it is not kept; `parts` yields the pieces of mask and scale."""
    if keep.least > 0:
        erase(vector, abs(vector) >= keep.least)
    if keep.most < math.inf:
        erase(vector, abs(vector) <= keep.most)
    if keep.mask is not None:
        erase(vector, next(parts))
    if not isinstance(keep.scale, float | int):
        vector *= next(parts)
    elif keep.scale != 1:
        vector *= keep.scale
    return vector


def _weighted(vector: Array, weight: float) -> Array:
    if weight != 1:
        vector *= weight
    return vector


def _elected(vectors: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    """Return the sum of the elements that have the sign of the whole sum, over their weights if asked."""
    xp = namespace(vectors[0])
    total = vectors[0] + 0.0
    for vector in vectors[1:]:
        total += vector
    total += 0.0  # -0.0, which would elect minus, becomes 0.0
    sign = xp.copysign(xp.ones_like(total), total)
    mix = xp.zeros_like(total)
    divisor = xp.zeros_like(total)
    for vector, weight in zip(vectors, weights, strict=True):
        agreeing = vector * sign  # positive where an expert agrees
        agreeing = xp.maximum(agreeing, xp.zeros_like(agreeing[:1]))
        mix += agreeing
        if normalize:
            counted = as_numbers(agreeing > 0, total)
            divisor += counted if weight == 1 else counted * weight
    mix *= sign
    if normalize:
        divisor += as_numbers(divisor == 0, total)
        mix /= divisor
    return mix
