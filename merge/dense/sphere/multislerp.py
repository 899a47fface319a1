"""Multi-SLERP: one-step spherical mean of several models, in the tangent space at their linear mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import inner_products, weighted_sum


@dataclass(frozen=True)
class MultislerpOptions:
    """Options of Multi-SLERP."""

    normalize_weights: bool = True
    """Divide the weights by their sum."""
    eps: float = 1e-8
    """Added to norms before division."""
    task_vectors: bool = False
    """Interpolate the task vectors and add the result to the seed."""


def multislerp(group: TensorGroup, options: MultislerpOptions) -> Any:
    """Return the tangent-space mean at the linear mean, mapped to the sphere and scaled to the mean norm.

    As in mergekit. The result lies in the span of the experts, so only their Gram matrix is needed. Raises
    `ValueError` if the experts cancel each other.
    """
    import numpy as np

    base = group.seed if options.task_vectors else None
    if len(group.experts) == 1:
        return group.experts[0]
    weights = np.array(group.weights, dtype=float)
    if options.normalize_weights:
        weights = weights / weights.sum()
    products = np.array(inner_products(group.experts, base))
    norms = np.sqrt(np.diag(products))
    units = products / np.outer(norms + options.eps, norms + options.eps)

    def norm_of(coefficients: Any) -> float:
        return float(np.sqrt(max(coefficients @ units @ coefficients, 0.0)))

    mean_norm = norm_of(weights)
    if mean_norm < options.eps:
        if len(group.experts) > 2 and norms.max() > options.eps:
            raise ValueError(f"the experts cancel each other in tensor '{group.name}'; choose other weights")
        return _combine(weights, group, base)
    mean = weights / mean_norm
    cosines = units @ mean
    tangent = weights - (weights * cosines).sum() * mean
    angle = norm_of(tangent) + options.eps
    direction = mean * np.cos(angle) + tangent * (np.sin(angle) / angle)
    return _combine(direction / (norms + options.eps) * (weights * norms).sum(), group, base)


def _combine(coefficients: Any, group: TensorGroup, base: Any) -> Any:
    """Return base + sum_i c_i (expert_i - base), or sum_i c_i expert_i without a base."""
    factors = [float(coefficient) for coefficient in coefficients]
    if base is None:
        return weighted_sum(factors, group.experts)
    return weighted_sum((1 - sum(factors), *factors), (base, *group.experts))
