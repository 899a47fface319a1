"""Model Stock: how far to go from the seed to the experts' mean, told by how much they agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import Array, inner_products, namespace, weighted_sum

_SMALLEST = 1e-6


@dataclass(frozen=True)
class ModelStockOptions:
    """What is taken as one vector."""

    filter_wise: bool = False
    """Each row by itself, instead of the whole tensor."""


def model_stock(group: TensorGroup, options: ModelStockOptions) -> Any:
    """Return t * mean + (1 - t) * seed with t = N c / (1 + (N - 1) c) (arXiv:2403.19522, section 4.2).

    N is the number of experts and c the mean cosine between pairs of task vectors.
    """
    count = len(group.experts)
    if count < 2:
        raise ValueError(
            f"model_stock compares experts with one another; it takes 2 or more, and here is {count}"
        )
    if options.filter_wise and group.seed.ndim > 1:
        return _row_by_row(group)
    products = inner_products(group.experts, group.seed)
    cosines = [
        products[i][j] / max(math.sqrt(products[i][i] * products[j][j]), _SMALLEST)
        for i, j in combinations(range(count), 2)
    ]
    t = _ratio(sum(max(-1.0, min(1.0, one)) for one in cosines) / len(cosines), count)
    return weighted_sum((1 - t, *[t / count] * count), (group.seed, *group.experts))


def _ratio(cosine: float, count: int) -> float:
    denominator = 1 + (count - 1) * cosine
    return count * cosine / denominator if abs(denominator) >= _SMALLEST else 0.0


def _row_by_row(group: TensorGroup) -> Array:
    xp = namespace(group.seed)
    count = len(group.experts)
    vectors = [expert - group.seed for expert in group.experts]
    lengths = [xp.sqrt(xp.sum(one * one, axis=-1, keepdims=True)) for one in vectors]
    cosine = xp.zeros_like(lengths[0])
    pairs = list(combinations(range(count), 2))
    for i, j in pairs:
        product = xp.sum(vectors[i] * vectors[j], axis=-1, keepdims=True)
        cosine += xp.clip(product / xp.clip(lengths[i] * lengths[j], _SMALLEST, math.inf), -1.0, 1.0)
    cosine /= len(pairs)
    denominator = 1 + (count - 1) * cosine
    singular = abs(denominator) < _SMALLEST
    t = xp.where(
        singular,
        xp.zeros_like(cosine),
        count * cosine / xp.where(singular, xp.ones_like(cosine), denominator),
    )
    mean = vectors[0]
    for vector in vectors[1:]:
        mean = mean + vector
    return group.seed + t * mean / count
