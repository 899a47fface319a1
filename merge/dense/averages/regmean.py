"""RegMean: least-squares fit of linear layers to the outputs of every expert on its own inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ....core.hooks.option_checks import check_at_least, check_range
from ..arrays import Array, namespace
from .linear import fused_weighted_sum


@dataclass(frozen=True)
class RegmeanOptions:
    """Options of RegMean."""

    scale: float = 0.9
    """Factor applied to the off-diagonal elements of the Gram matrices: 1 is plain least squares, 0 a
    weighted mean per input feature; the paper uses 0.9 for most models."""
    ridge: float = 1e-6
    """Ridge added to the diagonal, relative to its mean; constant inputs would make the system singular."""

    def __post_init__(self) -> None:
        check_range("scale", self.scale, 0, 1)
        check_at_least("ridge", self.ridge, 0)


def regmean(group: TensorGroup, options: RegmeanOptions) -> Any:
    """Return W with W^T = (sum_i w_i G_i)^-1 sum_i w_i G_i W_i^T (arXiv:2212.09849, section 3).

    G_i = X_i^T X_i / N of the layer's inputs has shape (in, in), W_i has shape (out, in). Tensors without a Gram
    matrix, which do not belong to a linear layer, are averaged by weight. The system is solved in float64.
    """
    if not group.statistics or any(gram is None for gram in group.statistics):
        return fused_weighted_sum(group.experts, group.weights)
    xp = namespace(group.experts[0])
    left = right = None
    for expert, gram, weight in zip(group.experts, group.statistics, group.weights, strict=True):
        shrunk = _shrink_gram(gram, options) * weight
        product = shrunk @ xp.astype(expert, xp.float64).T
        left = shrunk if left is None else left + shrunk
        right = product if right is None else right + product
    return xp.astype(xp.linalg.solve(left, right).T, group.experts[0].dtype)


def _shrink_gram(gram: Array, options: RegmeanOptions) -> Array:
    xp = namespace(gram)
    gram = xp.astype(gram, xp.float64)
    identity = xp.eye(gram.shape[0], dtype=xp.float64, device=gram.device)
    diagonal = gram * identity
    ridge = options.ridge * xp.sum(diagonal) / gram.shape[0]
    return gram * options.scale + diagonal * (1 - options.scale) + identity * ridge
