"""Karcher mean: the point on the sphere whose distances to all models balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....core.hooks.merging import TensorGroup
from ..arrays import inner_products, weighted_sum

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class KarcherOptions:
    """When to stop."""

    max_iter: int = 10
    """Most steps towards the mean."""
    tol: float = 1e-5
    """Steps, angles and lengths below it count as zero."""

    def __post_init__(self) -> None:
        if self.max_iter < 1 or self.tol <= 0:
            raise ValueError(
                f"max_iter is {self.max_iter} and tol {self.tol}; give at least 1, and more than 0"
            )


def karcher(group: TensorGroup, options: KarcherOptions) -> Any:
    """Return the Riemannian mean of the models' directions, times their mean length (arXiv:2603.04972).

    The mean lies in the span of the models, so that the iteration runs on coefficients and inner products alone.
    """
    import numpy as np

    products = np.array(inner_products(group.experts))
    lengths = np.sqrt(np.diag(products))
    shares = np.array(group.weights, dtype=float)
    shares = shares / shares.sum()
    taken = lengths > options.tol
    if not taken.any():
        return weighted_sum(tuple(shares), group.experts)
    units = products / np.outer(np.where(taken, lengths, 1), np.where(taken, lengths, 1))
    weights = np.where(taken, shares, 0) / shares[taken].sum()
    mean = _mean_direction(units, weights, options, int(np.argmax(taken)))
    coefficients = np.where(taken, mean / np.where(taken, lengths, 1), 0) * (shares * lengths).sum()
    return weighted_sum([float(one) for one in coefficients], group.experts)


def _mean_direction(
    units: NDArray[Any], weights: NDArray[Any], options: KarcherOptions, fallback: int
) -> NDArray[Any]:
    """Return the coefficients of the mean direction in the unit vectors, whose inner products are `units`."""
    import numpy as np

    def length(coefficients: NDArray[Any]) -> float:
        return float(np.sqrt(max(coefficients @ units @ coefficients, 0.0)))

    start = length(weights)
    mean = weights / start if start >= options.tol else np.eye(len(weights))[fallback]
    for _ in range(options.max_iter):
        cosines = np.clip(units @ mean, -1.0, 1.0)
        angles = np.arccos(cosines)
        factors = weights * np.where(angles < options.tol, 0.0, angles / np.maximum(np.sin(angles), 1e-300))
        tangent = factors - (factors * cosines).sum() * mean
        size = length(tangent)
        if size < options.tol:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * tangent
        mean = mean / length(mean)
    return mean
