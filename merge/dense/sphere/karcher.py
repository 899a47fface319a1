"""Karcher (Riemannian) mean of several models on the sphere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....core.hooks.merging import TensorGroup
from ....core.hooks.option_checks import check_at_least, check_positive
from ..arrays import inner_products, weighted_sum

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class KarcherOptions:
    """Options of the Karcher mean."""

    max_iter: int = 10
    """Maximum number of iterations."""
    tol: float = 1e-5
    """Tolerance below which steps, angles and norms are treated as zero."""

    def __post_init__(self) -> None:
        check_at_least("max_iter", self.max_iter, 1)
        check_positive("tol", self.tol)


def karcher(group: TensorGroup, options: KarcherOptions) -> Any:
    """Return the Riemannian mean of the models' directions, scaled to their mean norm (arXiv:2603.04972).

    The mean lies in the span of the models, so the iteration needs only coefficients and the Gram matrix.
    """
    import numpy as np

    products = np.array(inner_products(group.experts))
    norms = np.sqrt(np.diag(products))
    shares = np.array(group.weights, dtype=float)
    shares = shares / shares.sum()
    is_nonzero = norms > options.tol
    if not is_nonzero.any():
        return weighted_sum(tuple(shares), group.experts)
    divisors = np.where(is_nonzero, norms, 1)
    units = products / np.outer(divisors, divisors)
    weights = np.where(is_nonzero, shares, 0) / shares[is_nonzero].sum()
    mean = _mean_direction(units, weights, options, int(np.argmax(is_nonzero)))
    coefficients = np.where(is_nonzero, mean / divisors, 0) * (shares * norms).sum()
    return weighted_sum(coefficients.tolist(), group.experts)


def _mean_direction(units: NDArray[Any], weights: NDArray[Any], options: KarcherOptions, fallback: int) -> NDArray[Any]:
    """Return the coefficients of the mean direction over unit vectors with Gram matrix `units`."""
    import numpy as np

    def norm_of(coefficients: NDArray[Any]) -> float:
        return float(np.sqrt(max(coefficients @ units @ coefficients, 0.0)))

    start_norm = norm_of(weights)
    mean = weights / start_norm if start_norm >= options.tol else np.eye(len(weights))[fallback]
    for _ in range(options.max_iter):
        cosines = np.clip(units @ mean, -1.0, 1.0)
        angles = np.arccos(cosines)
        factors = weights * np.where(angles < options.tol, 0.0, angles / np.maximum(np.sin(angles), 1e-300))
        tangent = factors - (factors * cosines).sum() * mean
        step = norm_of(tangent)
        if step < options.tol:
            break
        mean = np.cos(step) * mean + np.sin(step) / step * tangent
        mean = mean / norm_of(mean)
    return mean
