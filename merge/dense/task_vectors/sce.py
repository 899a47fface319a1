"""SCE: select elements by variance, calculate expert weights from the task vectors, erase minority signs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ....core.hooks.option_checks import check_range
from ..arrays import Array, chunks, inner_products, is_numpy, map_chunks, namespace
from ..largest import kth_largest_magnitude


@dataclass(frozen=True)
class SceOptions:
    """Options of SCE."""

    select_topk: float = 1.0
    """Fraction of the elements of nonzero variance that is kept, largest first; 0.1 and more in the paper."""

    def __post_init__(self) -> None:
        check_range("select_topk", self.select_topk, 0, 1)


def sce(group: TensorGroup, options: SceOptions) -> Any:
    """Return the seed plus the fused task vectors (arXiv:2408.07990, section 3.3).

    Per tensor: select elements by their variance over the experts, weight each expert by the squared norm of
    its selected task vector, and erase elements whose sign differs from that of the unweighted sum.
    """
    min_variance = _min_variance(group, options.select_topk)
    squared_norms = _squared_norms(group, min_variance)
    total = sum(squared_norms)
    count = len(squared_norms)
    shares = [squared_norm / total for squared_norm in squared_norms] if total > 0 else [1 / count] * count

    def merge_chunk(seed: Array, *experts: Array) -> Array:
        xp = namespace(seed)
        vectors = _selected_vectors(seed, experts, min_variance)
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

    return map_chunks(merge_chunk, group.seed, *group.experts)


def _selected_vectors(seed: Array, experts: Sequence[Array], min_variance: float) -> list[Array]:
    vectors = [expert - seed for expert in experts]
    if min_variance == 0:
        return vectors
    selected = _variance(vectors) >= min_variance
    return [vector * selected for vector in vectors]


def _variance(vectors: list[Array]) -> Array:
    mean = vectors[0] + 0
    for vector in vectors[1:]:
        mean += vector
    mean /= len(vectors)
    total = (vectors[0] - mean) ** 2
    for vector in vectors[1:]:
        total += (vector - mean) ** 2
    return total / len(vectors)


def _min_variance(group: TensorGroup, share: float) -> float:
    """Return the smallest selected variance; 0 selects everything, infinity nothing."""
    if share >= 1:
        return 0.0
    variances = map_chunks(
        lambda seed, *experts: _variance([expert - seed for expert in experts]), group.seed, *group.experts
    )
    count = int(share * int((variances > 0).sum()))
    return kth_largest_magnitude(variances, count) if count else math.inf


def _squared_norms(group: TensorGroup, min_variance: float) -> list[float]:
    """Return the squared norm of each selected task vector."""
    if min_variance == 0:
        products = inner_products(group.experts, group.seed)
        return [products[number][number] for number in range(len(products))]
    sums = [0.0] * len(group.experts)
    for seed, *experts in chunks(group.seed, *group.experts):
        for number, vector in enumerate(_selected_vectors(seed, experts, min_variance)):
            sums[number] += float((vector**2).sum())
    return sums
