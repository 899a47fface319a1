"""Multi-SLERP: a weighted mean of several models on the sphere, in one step from their straight mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import inner_products, weighted_sum


@dataclass(frozen=True)
class MultislerpOptions:
    """How weights count."""

    normalize_weights: bool = True
    """Divide the weights by their sum."""
    eps: float = 1e-8
    """Added where a length is divided by."""
    task_vectors: bool = False
    """Interpolate what the experts learned, and add it to the seed."""


def multislerp(group: TensorGroup, options: MultislerpOptions) -> Any:
    """Return the experts' mean in the tangent space at their straight mean, mapped back and given their mean length.

    As in mergekit. The result lies in the span of the experts: it is worked out on inner products. Raises
    `ValueError` where the experts cancel each other.
    """
    import numpy as np

    base = group.seed if options.task_vectors else None
    if len(group.experts) == 1:
        return group.experts[0]
    weights = np.array(group.weights, dtype=float)
    if options.normalize_weights:
        weights = weights / weights.sum()
    products = np.array(inner_products(group.experts, base))
    lengths = np.sqrt(np.diag(products))
    units = products / np.outer(lengths + options.eps, lengths + options.eps)

    def length(coefficients: Any) -> float:
        return float(np.sqrt(max(coefficients @ units @ coefficients, 0.0)))

    start = length(weights)
    if start < options.eps:
        if len(group.experts) > 2 and lengths.max() > options.eps:
            raise ValueError(
                f"the experts' directions cancel each other in '{group.name}'; choose other weights"
            )
        return _on_seed(weights, group, base)
    mean = weights / start
    cosines = units @ mean
    tangent = weights - (weights * cosines).sum() * mean
    size = length(tangent) + options.eps
    direction = mean * np.cos(size) + tangent * (np.sin(size) / size)
    return _on_seed(direction / (lengths + options.eps) * (weights * lengths).sum(), group, base)


def _on_seed(coefficients: Any, group: TensorGroup, base: Any) -> Any:
    given = [float(one) for one in coefficients]
    if base is None:
        return weighted_sum(given, group.experts)
    return weighted_sum((1 - sum(given), *given), (base, *group.experts))
