"""SCE: select the elements in which experts differ most, weigh experts by how far they moved, erase the minority."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import (
    Array,
    check_range,
    in_pieces,
    inner_products,
    is_numpy,
    kth_largest_magnitude,
    namespace,
    pieces,
)


@dataclass(frozen=True)
class SceOptions:
    """How much is selected."""

    select_topk: float = 1.0
    """Share of the elements with a variance that is kept, those with the largest; the paper tries 0.1 and more."""

    def __post_init__(self) -> None:
        check_range("select_topk", self.select_topk, 0, 1)


def sce(group: TensorGroup, options: SceOptions) -> Any:
    """Return the seed plus the fused task vectors (arXiv:2408.07990, section 3.3).

    Per tensor: select by variance over the experts, calculate an expert's weight from the squares of its selected
    task vector, erase elements whose sign is not that of the unweighted sum.
    """
    least = _least_variance(group, options.select_topk)
    squares = _squares(group, least)
    total = sum(squares)
    count = len(squares)
    shares = [one / total for one in squares] if total > 0 else [1 / count] * count

    def piece(seed: Array, *experts: Array) -> Array:
        xp = namespace(seed)
        vectors = [expert - seed for expert in experts]
        if least > 0:
            selected = _variance(vectors) >= least
            vectors = [vector * selected for vector in vectors]
        summed = vectors[0] + 0
        for vector in vectors[1:]:
            summed += vector
        positive = summed >= 0
        mix, divisor = xp.zeros_like(seed), xp.zeros_like(seed)
        for vector, share in zip(vectors, shares, strict=True):
            agrees = xp.where(positive, vector > 0, vector < 0)
            mix += vector * agrees * share
            divisor += agrees * (seed.dtype.type(share) if is_numpy(seed) else share)
        return seed + mix / xp.clip(divisor, 1e-6, math.inf)

    return in_pieces(piece, group.seed, *group.experts)


def _variance(vectors: list[Array]) -> Array:
    mean = vectors[0] + 0
    for vector in vectors[1:]:
        mean += vector
    mean /= len(vectors)
    total = (vectors[0] - mean) ** 2
    for vector in vectors[1:]:
        total += (vector - mean) ** 2
    return total / len(vectors)


def _least_variance(group: TensorGroup, share: float) -> float:
    """Return the smallest variance that is selected; 0 keeps everything, infinity nothing."""
    if share >= 1:
        return 0.0

    def piece(seed: Array, *experts: Array) -> Array:
        return _variance([expert - seed for expert in experts])

    variances = in_pieces(piece, group.seed, *group.experts)
    count = int(share * int((variances > 0).sum()))
    return kth_largest_magnitude(variances, count) if count else math.inf


def _squares(group: TensorGroup, least: float) -> list[float]:
    """Return the sum of squares of each selected task vector."""
    if least == 0:
        products = inner_products(group.experts, group.seed)
        return [products[number][number] for number in range(len(products))]
    sums = [0.0] * len(group.experts)

    for seed, *experts in pieces(group.seed, *group.experts):
        vectors = [expert - seed for expert in experts]
        selected = _variance(vectors) >= least
        for number, vector in enumerate(vectors):
            sums[number] += float(((vector * selected) ** 2).sum())
    return sums
