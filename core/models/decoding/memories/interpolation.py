"""The distribution of neighbours and its interpolation with a model's (arXiv:1911.00172, equations 2 and 3).

p_kNN(y) is proportional to the sum of exp(-d_i / temperature) over the neighbours with token y, d_i a squared distance;
p = lambda p_kNN + (1 - lambda) p_LM. Everything is in log space. Shapes: Q = queries, k = neighbours, V = vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .search import Neighbours


def neighbour_log_probs(neighbours: Neighbours, temperature: float, vocabulary: int) -> Tensor:
    """Return log p_kNN, (Q, V), -inf for tokens without a neighbour; for no neighbours at all, of all tokens."""
    logits = -neighbours.distances.double() / temperature
    weights = logits.log_softmax(dim=1).nan_to_num(nan=-math.inf, neginf=-math.inf)
    shape = (len(weights), vocabulary)
    largest = weights.new_full(shape, -math.inf).scatter_reduce(1, neighbours.tokens, weights, "amax")
    shifted = (weights - largest.gather(1, neighbours.tokens)).exp().nan_to_num(0.0)
    sums = weights.new_zeros(shape).scatter_add(1, neighbours.tokens, shifted)
    return (largest + sums.log()).nan_to_num(nan=-math.inf, neginf=-math.inf)


def interpolate(model_QV: Tensor, neighbours: Neighbours, lambda_: float, temperature: float) -> Tensor:
    """Return log p in float32, (Q, V), by the log-probabilities of the model; without neighbours, those of the model."""
    if lambda_ == 0:
        return model_QV
    log_knn = neighbour_log_probs(neighbours, temperature, model_QV.shape[-1])
    log_model = model_QV.double()
    mixed = log_knn if lambda_ == 1 else torch.logaddexp(math.log(lambda_) + log_knn, math.log1p(-lambda_) + log_model)
    has_neighbours = neighbours.distances.isfinite().any(dim=1, keepdim=True)
    return torch.where(has_neighbours, mixed, log_model).float()
