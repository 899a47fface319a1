"""NuSLERP: weighted SLERP of two models or task vectors, over whole tensors, rows or columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import Array, inner_products, namespace, weighted_sum
from .slerp import arc_coefficients

_PARALLEL_SINE_SQUARED = 1e-16
_SMALLEST_NORM = 1e-7


@dataclass(frozen=True)
class NuslerpOptions:
    """Options of NuSLERP."""

    nuslerp_flatten: bool = True
    """Interpolate the flattened tensor as one vector instead of row by row or column by column."""
    nuslerp_row_wise: bool = False
    """Without flattening: take vectors along the first axis instead of the last."""
    task_vectors: bool = False
    """Interpolate the task vectors and add the result to the seed."""


def nuslerp(group: TensorGroup, options: NuslerpOptions) -> Any:
    """Return the SLERP of two models as in mergekit, t = w_2 / (w_1 + w_2); raises `ValueError` for other counts."""
    if len(group.experts) != 2:
        raise ValueError(f"nuslerp interpolates two experts, and {len(group.experts)} are given")
    base = group.seed if options.task_vectors else None
    total = sum(group.weights)
    t = group.weights[1] / total if abs(total) >= 1e-6 else 0.5
    if options.nuslerp_flatten or group.experts[0].ndim < 2:
        return _slerp_flat(group, t, base)
    return _slerp_rows(group, t, base, 0 if options.nuslerp_row_wise else -1)


def _slerp_flat(group: TensorGroup, t: float, base: Array | None) -> Array:
    products = inner_products(group.experts, base)
    norms = [max(math.sqrt(products[number][number]), _SMALLEST_NORM) for number in (0, 1)]
    cosine = max(-1.0, min(1.0, products[0][1] / (norms[0] * norms[1])))
    first, second = arc_coefficients(cosine, t, 1 - cosine**2 <= _PARALLEL_SINE_SQUARED)
    if base is None:
        return weighted_sum((first, second), group.experts)
    return weighted_sum((1 - first - second, first, second), (base, *group.experts))


def _slerp_rows(group: TensorGroup, t: float, base: Array | None, axis: int) -> Array:
    xp = namespace(group.experts[0])
    endpoints = [expert if base is None else expert - base for expert in group.experts]
    norms = [
        xp.clip(xp.sqrt(xp.sum(endpoint * endpoint, axis=axis, keepdims=True)), _SMALLEST_NORM, math.inf)
        for endpoint in endpoints
    ]
    cosine = xp.clip(xp.sum((endpoints[0] / norms[0]) * (endpoints[1] / norms[1]), axis=axis, keepdims=True), -1.0, 1.0)
    is_parallel = 1 - cosine * cosine <= _PARALLEL_SINE_SQUARED
    angle = xp.acos(xp.where(is_parallel, xp.zeros_like(cosine), cosine))
    sine = xp.sin(angle)
    first = xp.where(is_parallel, xp.full_like(cosine, 1 - t), xp.sin((1 - t) * angle) / sine)
    second = xp.where(is_parallel, xp.full_like(cosine, t), xp.sin(t * angle) / sine)
    result = first * endpoints[0] + second * endpoints[1]
    return result if base is None else result + base
