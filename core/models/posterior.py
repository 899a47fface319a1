"""The domain posterior: how probable each expert's domain is, given the text so far.

Branch-Train-Merge (arXiv:2208.03306) and DEMix (arXiv:2108.05036). Shapes: K = experts, B = batch,
T = predicted tokens. Everything is in natural logarithms and float32.

The paper weighs expert j by the likelihood of the whole prefix; the code released with it looks at the last
token only. Both are here (`prefix`, `last_token`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

PosteriorKind = Literal["prefix", "last_token"]
EWMA_RATE = 0.3  # `pandas.ewm(alpha=0.3, adjust=False)` in the released evaluation


def evidence(token_log_probs_KBT: Tensor, kind: PosteriorKind) -> Tensor:
    """Return what each expert's account of the text before token t adds to its log prior, shape (K, B, T).

    At the first token there is no evidence. Tokens to be left out (padding) carry log-probability 0.
    """
    import torch

    shifted = torch.zeros_like(token_log_probs_KBT)
    shifted[..., 1:] = token_log_probs_KBT[..., :-1]
    return shifted.cumsum(dim=-1) if kind == "prefix" else shifted


def log_posterior(token_log_probs_KBT: Tensor, log_prior_K: Tensor, kind: PosteriorKind) -> Tensor:
    """Return log p(D = k | x_<t) for every token, shape (K, B, T); sums to 1 over K."""
    weights = log_prior_K[:, None, None] + evidence(token_log_probs_KBT, kind)
    return weights.log_softmax(dim=0)


def mixture_log_probs(token_log_probs_KBT: Tensor, log_prior_K: Tensor, kind: PosteriorKind) -> Tensor:
    """Return log p(x_t | x_<t) of the mixture for every token, shape (B, T)."""
    return (log_posterior(token_log_probs_KBT, log_prior_K, kind) + token_log_probs_KBT).logsumexp(dim=0)


def mean_posterior(token_log_probs_KBT: Tensor, log_prior_K: Tensor, kind: PosteriorKind) -> Tensor:
    """Return the posterior averaged over tokens and sequences, shape (K,)."""
    return log_posterior(token_log_probs_KBT, log_prior_K, kind).exp().mean(dim=(1, 2))


def updated_prior(prior_K: Tensor, batch: Sequence[Tensor], kind: PosteriorKind) -> Tensor:
    """Return the prior after one more batch: exponentially weighted mean of the posteriors seen.

    A batch is a list of token log-probabilities (K, B, T), since texts of one batch may differ in length.
    """
    import torch

    seen = torch.stack([mean_posterior(scores, prior_K.log(), kind) for scores in batch]).mean(dim=0)
    return EWMA_RATE * seen + (1 - EWMA_RATE) * prior_K


def cached_prior(batches: Iterable[Sequence[Tensor]], num_experts: int, kind: PosteriorKind) -> Tensor:
    """Return the prior that `updated_prior` reaches over some batches; starts uniform."""
    import torch

    prior = torch.full((num_experts,), 1.0 / num_experts)
    for batch in batches:
        prior = updated_prior(prior, batch, kind)
    return prior


def keep_top(prior_K: Tensor, top_k: int) -> Tensor:
    """Return the prior with all but its `top_k` largest entries zeroed, renormalised; ties keep the earlier."""
    import torch

    kept = prior_K.argsort(descending=True, stable=True)[:top_k]
    result = torch.zeros_like(prior_K)
    result[kept] = prior_K[kept]
    return result / result.sum()
