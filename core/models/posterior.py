"""The domain posterior: the probability of each expert's domain, given the preceding tokens.

Branch-Train-Merge (arXiv:2208.03306) and DEMix (arXiv:2108.05036). Shapes: K = experts, B = batch,
T = predicted tokens. All values are natural logarithms in float32.

The paper weights each expert by the likelihood of the whole prefix; its released code uses the last token only. Both
are implemented (`prefix`, `last_token`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

PosteriorKind = Literal["prefix", "last_token"]
EWMA_RATE = 0.3  # `pandas.ewm(alpha=0.3, adjust=False)` in the released evaluation


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


def updated_prior(prior_K: Tensor, batch: Sequence[Tensor], kind: PosteriorKind) -> Tensor:
    """Return the prior after one more batch: an exponentially weighted moving average of the posteriors.

    A batch is a list of token log-probabilities (K, B, T), since texts of one batch may differ in length.
    """
    import torch

    posterior_K = torch.stack([mean_posterior(scores, prior_K.log(), kind) for scores in batch]).mean(dim=0)
    return EWMA_RATE * posterior_K + (1 - EWMA_RATE) * prior_K


def cached_prior(batches: Iterable[Sequence[Tensor]], num_experts: int, kind: PosteriorKind) -> Tensor:
    """Return the prior after all batches (`updated_prior`), starting from the uniform prior."""
    import torch

    prior = torch.full((num_experts,), 1.0 / num_experts)
    for batch in batches:
        prior = updated_prior(prior, batch, kind)
    return prior


def keep_top(prior_K: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` largest entries of a prior and renormalise; ties keep the earlier entry."""
    import torch

    kept = prior_K.argsort(descending=True, stable=True)[:top_k]
    result = torch.zeros_like(prior_K)
    result[kept] = prior_K[kept]
    return result / result.sum()
