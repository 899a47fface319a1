"""Linear merging (model soups): the weighted average of models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import Array, is_numpy, namespace

BLOCK = 1 << 16
"""Numbers that are added at a time, so that their float64 products fit into scratch memory that is used again."""


@dataclass(frozen=True)
class LinearOptions:
    """Options of linear merging."""

    normalize: bool = True
    """Divide by the sum of the weights; false gives the weighted sum."""


def linear(group: TensorGroup, options: LinearOptions) -> Any:
    """Return sum_i w_i theta_i, divided by sum_i w_i if `normalize` is set (arXiv:2203.05482, section 2)."""
    total = fused_weighted_sum(group.experts, group.weights)
    if options.normalize:
        total /= _sum_as_float32(group.weights)
    return total


def average(group: TensorGroup, options: Any) -> Any:
    """Return the weighted mean (arXiv:2208.03306, section 5); equal weights are summed in float64, exact for copies."""
    if len(set(group.weights)) > 1:
        return fused_weighted_sum(group.experts, group.weights)
    xp = namespace(group.experts[0])
    total = xp.astype(group.experts[0], xp.float64)
    for expert in group.experts[1:]:
        total += expert
    return xp.astype(total / len(group.experts), group.experts[0].dtype)


def fused_weighted_sum(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return the weighted sum of arrays by fused multiply-add: one rounding per product, as torch.addcmul."""
    if not is_numpy(arrays[0]):
        import torch

        added = torch.zeros_like(arrays[0])
        for array, weight in zip(arrays, weights, strict=True):
            added.addcmul_(array, torch.tensor(weight, dtype=added.dtype, device=added.device))
        return added
    import numpy as np

    total = np.zeros(arrays[0].shape, arrays[0].dtype)
    sums = total.reshape(-1)
    addends = [(np.ravel(array), total.dtype.type(weight)) for array, weight in zip(arrays, weights, strict=True)]
    count = math.prod(total.shape)
    wide = np.empty(min(BLOCK, count), np.float64)
    for begin in range(0, count, BLOCK):
        block = sums[begin : begin + BLOCK]
        for array, weight in addends:
            _add_product(block, array[begin : begin + BLOCK], weight, wide[: len(block)])
    return total


def _add_product(total: Array, array: Array, weight: Any, wide: Array) -> None:
    """Add `array * weight` to `total` in place as a fused multiply-add: exact product, one rounding.

    A product with a power of two is exact. Other products are computed in float64, which holds any product of
    two float32 numbers exactly, in the scratch array `wide`.
    """
    import numpy as np

    mantissa, _ = math.frexp(float(weight))
    if weight == 1:
        np.add(total, array, out=total)
    elif weight == 0 and bool(np.isfinite(array).all()):
        return
    elif abs(mantissa) == 0.5 or total.dtype != np.float32:
        np.add(total, array * weight, out=total)
    else:
        np.multiply(array, weight, out=wide, dtype=np.float64)
        np.add(wide, total, out=wide)
        total[...] = wide


def _sum_as_float32(weights: Sequence[float]) -> float:
    import numpy as np

    total = np.float32(0)
    for weight in weights:
        total = np.float32(total + np.float32(weight))
    if total == 0:
        raise ValueError("the weights sum to 0, so they cannot be normalized; set normalize to false")
    return float(total)
