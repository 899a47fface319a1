"""Model Stock: interpolate between seed and mean of the experts by the angle between task vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import add
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import Array, inner_products, namespace, weighted_sum

_EPSILON = 1e-6


@dataclass(frozen=True)
class ModelStockOptions:
    """Options of Model Stock."""

    filter_wise: bool = False
    """Compute the interpolation ratio per row instead of per tensor."""


def model_stock(group: TensorGroup, options: ModelStockOptions) -> Any:
    """Return t * mean + (1 - t) * seed with t = N c / (1 + (N - 1) c) (arXiv:2403.19522, section 4.2).

    N is the number of experts and c the mean cosine between pairs of task vectors. Task vectors that oppose each other
    (c < 0) give the seed: the formula assumes c >= 0, and diverges as c approaches -1 / (N - 1).
    """
    count = len(group.experts)
    if count < 2:
        raise ValueError(f"model_stock needs 2 or more experts, and {count} is given; add one or choose another method")
    if options.filter_wise and group.seed.ndim > 1:
        return _merge_rows(group)
    products = inner_products(group.experts, group.seed)
    cosines = [
        products[i][j] / max(math.sqrt(products[i][i] * products[j][j]), _EPSILON)
        for i, j in combinations(range(count), 2)
    ]
    cosine = max(0.0, sum(min(1.0, cosine) for cosine in cosines) / len(cosines))
    t = count * cosine / (1 + (count - 1) * cosine)
    return weighted_sum((1 - t, *[t / count] * count), (group.seed, *group.experts))


def _merge_rows(group: TensorGroup) -> Array:
    xp = namespace(group.seed)
    count = len(group.experts)
    vectors = [expert - group.seed for expert in group.experts]
    norms = [xp.sqrt(xp.sum(vector * vector, axis=-1, keepdims=True)) for vector in vectors]
    cosine = xp.zeros_like(norms[0])
    pairs = list(combinations(range(count), 2))
    for i, j in pairs:
        product = xp.sum(vectors[i] * vectors[j], axis=-1, keepdims=True)
        cosine += xp.clip(product / xp.clip(norms[i] * norms[j], _EPSILON, math.inf), -1.0, 1.0)
    cosine = xp.clip(cosine / len(pairs), 0.0, 1.0)
    t = count * cosine / (1 + (count - 1) * cosine)
    return group.seed + t * reduce(add, vectors) / count
