"""The domain posterior: the probability of each expert's domain, given the preceding tokens.

Branch-Train-Merge (arXiv:2208.03306) and DEMix (arXiv:2108.05036). Shapes: K = experts, B = batch,
T = predicted tokens. All values are natural logarithms in float32.

The paper weights each expert by the likelihood of the whole prefix; its released code uses the last token only. Both
are implemented (`prefix`, `last_token`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

PosteriorKind = Literal["prefix", "last_token"]
EWMA_RATE = 0.3  # `pandas.ewm(alpha=0.3, adjust=False)` in the released evaluation
SMALLEST_PRIOR = 1e-6


def evidence(token_log_probs_KBT: Tensor, kind: PosteriorKind) -> Tensor:
    """Return each expert's log-likelihood of the text before token t, which adds to its log prior, shape (K, B, T).

    It is 0 at the first token. Ignored tokens (padding) must have log-probability 0.
    """
    import torch

    shifted = torch.zeros_like(token_log_probs_KBT)
    shifted[..., 1:] = token_log_probs_KBT[..., :-1]
    return shifted.cumsum(dim=-1) if kind == "prefix" else shifted


def log_posterior(token_log_probs_KBT: Tensor, log_prior_K: Tensor, kind: PosteriorKind) -> Tensor:
    """Return log p(D = k | x_<t) for every token, shape (K, B, T); the probabilities sum to 1 over K."""
    return (log_prior_K[:, None, None] + evidence(token_log_probs_KBT, kind)).log_softmax(dim=0)


def mean_posterior(token_log_probs_KBT: Tensor, log_prior_K: Tensor, kind: PosteriorKind) -> Tensor:
    """Return the posterior averaged over tokens and sequences, shape (K,)."""
    return log_posterior(token_log_probs_KBT, log_prior_K, kind).exp().mean(dim=(1, 2))


def last_posterior(token_log_probs_KBT: Tensor, log_prior_K: Tensor, kind: PosteriorKind) -> Tensor:
    """Return the posterior that predicts the last token, averaged over sequences, shape (K,).

    The released scorer reads it there too (`weights[:, :, -1]`), rather than averaging over positions.
    """
    return log_posterior(token_log_probs_KBT, log_prior_K, kind)[..., -1].exp().mean(dim=1)


def updated_prior(prior_K: Tensor | None, posterior_K: Tensor) -> Tensor:
    """Return the prior after one more posterior: their exponentially weighted moving average.

    It starts with the first posterior (`prior_K` is None), as with `adjust=False`. No expert falls below `SMALLEST_PRIOR`,
    since a prior of 0 could never rise again.
    """
    mean = posterior_K if prior_K is None else EWMA_RATE * posterior_K + (1 - EWMA_RATE) * prior_K
    mean = mean.clamp(min=SMALLEST_PRIOR)
    return mean / mean.sum()


def cached_prior(blocks: Iterable[Tensor], num_experts: int, kind: PosteriorKind) -> Tensor:
    """Return the prior after blocks of one domain's text, (K,); each holds the log-probabilities of its tokens, (K, T).

    Without blocks it is uniform.
    """
    import torch

    uniform = torch.full((num_experts,), 1.0 / num_experts)
    prior: Tensor | None = None
    for scores in blocks:
        posterior = last_posterior(scores[:, None], (uniform if prior is None else prior).log(), kind)
        prior = updated_prior(prior, posterior)
    return uniform if prior is None else prior


def top_mask(scores_KBT: Tensor, top_k: int) -> Tensor:
    """Return whether an expert is among the `top_k` with the largest scores, (K, B, T); the earlier one of equals is."""
    import torch

    order = scores_KBT.argsort(dim=0, descending=True, stable=True)[:top_k]
    return torch.zeros_like(scores_KBT, dtype=torch.bool).scatter_(0, order, value=True)
