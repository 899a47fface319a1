"""NuSLERP: SLERP with weights, over whole tensors or row by row, of models or of task vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import Array, inner_products, namespace, weighted_sum
from .slerp import arc_coefficients

_PARALLEL = 1e-16
_SMALLEST_NORM = 1e-7


@dataclass(frozen=True)
class NuslerpOptions:
    """What is taken as one vector."""

    nuslerp_flatten: bool = True
    """The whole tensor is one vector; else each row or column is."""
    nuslerp_row_wise: bool = False
    """Without flattening: vectors along the first axis instead of the last."""
    task_vectors: bool = False
    """Interpolate what the experts learned, and add it to the seed."""


def nuslerp(group: TensorGroup, options: NuslerpOptions) -> Any:
    """Return the point between two models on the arc, at the second's share of the weights.

    As in mergekit; raises `ValueError` for another number of models than two.
    """
    if len(group.experts) != 2:
        raise ValueError(f"nuslerp is between two experts, and here are {len(group.experts)}")
    base = group.seed if options.task_vectors else None
    total = sum(group.weights)
    t = group.weights[1] / total if abs(total) >= 1e-6 else 0.5
    if options.nuslerp_flatten or group.experts[0].ndim < 2:
        return _whole(group, t, base)
    return _row_by_row(group, t, base, 0 if options.nuslerp_row_wise else -1)


def _whole(group: TensorGroup, t: float, base: Array | None) -> Array:
    products = inner_products(group.experts, base)
    lengths = [max(math.sqrt(products[number][number]), _SMALLEST_NORM) for number in (0, 1)]
    cosine = max(-1.0, min(1.0, products[0][1] / (lengths[0] * lengths[1])))
    first, second = arc_coefficients(cosine, t, 1 - cosine**2 <= _PARALLEL)
    if base is None:
        return weighted_sum((first, second), group.experts)
    return weighted_sum((1 - first - second, first, second), (base, *group.experts))


def _row_by_row(group: TensorGroup, t: float, base: Array | None, axis: int) -> Array:
    xp = namespace(group.experts[0])
    ends = [expert if base is None else expert - base for expert in group.experts]
    lengths = [
        xp.clip(xp.sqrt(xp.sum(end * end, axis=axis, keepdims=True)), _SMALLEST_NORM, math.inf)
        for end in ends
    ]
    cosine = xp.clip(
        xp.sum((ends[0] / lengths[0]) * (ends[1] / lengths[1]), axis=axis, keepdims=True), -1.0, 1.0
    )
    straight = 1 - cosine * cosine <= _PARALLEL
    angle = xp.acos(xp.where(straight, xp.zeros_like(cosine), cosine))
    sine = xp.sin(angle)
    first = xp.where(straight, xp.full_like(cosine, 1 - t), xp.sin((1 - t) * angle) / sine)
    second = xp.where(straight, xp.full_like(cosine, t), xp.sin(t * angle) / sine)
    result = first * ends[0] + second * ends[1]
    return result if base is None else result + base
