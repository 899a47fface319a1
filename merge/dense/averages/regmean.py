"""RegMean: the linear layer whose outputs come nearest to every expert's, on that expert's own inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ..arrays import Array, check_range, namespace
from .linear import weighted


@dataclass(frozen=True)
class RegmeanOptions:
    """How much the inputs' correlations count."""

    scale: float = 0.9
    """What off-diagonal elements of the Gram matrices are multiplied by: 1 is plain least squares, 0 a weighted mean
    per input; the paper takes 0.9 for most models."""
    ridge: float = 1e-6
    """Added to the diagonal, as a share of its mean: inputs that never vary leave the system singular."""

    def __post_init__(self) -> None:
        check_range("scale", self.scale, 0, 1)
        if self.ridge < 0:
            raise ValueError(f"ridge is {self.ridge}; it is 0 or more")


def regmean(group: TensorGroup, options: RegmeanOptions) -> Any:
    """Return W with W^T = (sum_i w_i G_i)^-1 sum_i w_i G_i W_i^T (arXiv:2212.09849, section 3).

    G_i = X_i^T X_i / N of the layer's inputs, of shape (in, in); W_i of shape (out, in). Tensors without a Gram
    matrix, which are no linear layers, are averaged by weight. Solved in float64.
    """
    if not group.statistics or any(one is None for one in group.statistics):
        return weighted(group.experts, group.weights)
    xp = namespace(group.experts[0])
    left = None
    right = None
    for expert, gram, weight in zip(group.experts, group.statistics, group.weights, strict=True):
        shrunk = _shrunk(gram, options) * weight
        product = shrunk @ xp.astype(expert, xp.float64).T
        left = shrunk if left is None else left + shrunk
        right = product if right is None else right + product
    return xp.astype(xp.linalg.solve(left, right).T, group.experts[0].dtype)


def _shrunk(gram: Array, options: RegmeanOptions) -> Array:
    xp = namespace(gram)
    wide = xp.astype(gram, xp.float64)
    identity = xp.eye(wide.shape[0], dtype=xp.float64, device=wide.device)
    diagonal = wide * identity
    ridge = options.ridge * xp.sum(diagonal) / wide.shape[0]
    return wide * options.scale + diagonal * (1 - options.scale) + identity * ridge
