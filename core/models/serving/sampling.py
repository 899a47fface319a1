"""The next token of every row of a batch, each by its own settings and random numbers. Shapes: B = rows, V = vocabulary.

A row's token depends on its own logits and random number only, so that its text is the same alone and in any batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .requests import TextRequest


def next_tokens(logits_BV: Tensor, requests: Sequence[TextRequest], randoms: Sequence[random.Random]) -> list[int]:
    """Return the next token of each row: the most probable one, or one sampled with the row's random numbers."""
    tokens: list[int] = logits_BV.argmax(dim=-1).tolist()
    sampled = [row for row, request in enumerate(requests) if request.temperature > 0]
    if not sampled:
        return tokens
    chosen = [requests[row] for row in sampled]
    logits = logits_BV[sampled].float()
    temperatures = torch.tensor([request.temperature for request in chosen], device=logits.device)
    probabilities = (logits / temperatures[:, None]).softmax(dim=-1)
    # uniform numbers by row: a generator of torch per row would cost more than the sampling
    uniform = torch.tensor([randoms[row].random() for row in sampled], dtype=torch.float64, device=logits.device)
    truncated = [row for row, request in enumerate(chosen) if request.top_p < 1 or request.top_k > 0]
    plain = [row for row in range(len(chosen)) if row not in truncated]
    if plain:  # never by the other way, however others are sampled: it would give another token for the same number
        _place(tokens, sampled, plain, _draw(probabilities[plain], uniform[plain]))
    if truncated:
        requests_of = [chosen[row] for row in truncated]
        _place(tokens, sampled, truncated, _truncated_draw(probabilities[truncated], uniform[truncated], requests_of))
    return tokens


def _place(tokens: list[int], sampled: Sequence[int], rows: Sequence[int], drawn: Tensor) -> None:
    for row, token in zip(rows, drawn.tolist(), strict=True):
        tokens[sampled[row]] = token


def _draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return the index (B,) at which the cumulative sum of each row passes its uniform number times the total."""
    sums = probabilities_BV.double().cumsum(dim=-1)
    drawn = torch.searchsorted(sums, (uniform_B * sums[:, -1])[:, None], right=True)[:, 0]
    return drawn.clamp(max=sums.shape[1] - 1)


def _truncated_draw(probabilities_BV: Tensor, uniform_B: Tensor, requests: Sequence[TextRequest]) -> Tensor:
    """Draw from each row's most probable tokens, by its `top_k` and `top_p`."""
    ordered, indices = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    size, device = ordered.shape[1], ordered.device
    top_k = torch.tensor([min(request.top_k or size, size) for request in requests], device=device)
    top_p = torch.tensor([request.top_p for request in requests], device=device)
    ordered = ordered.masked_fill(torch.arange(size, device=device) >= top_k[:, None], 0.0)
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    before = ordered.cumsum(dim=-1) - ordered  # a token is kept if those before it have less than top_p
    ordered = ordered.masked_fill(before >= top_p[:, None], 0.0)
    return indices.gather(1, _draw(ordered, uniform_B)[:, None])[:, 0]


def log_probabilities(
    logits_BV: Tensor, tokens: Sequence[int], requests: Sequence[TextRequest]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Return, by row that requests them, its token's log-probability and its most probable tokens with theirs."""
    rows = [row for row, request in enumerate(requests) if request.logprobs is not None]
    if not rows:
        return {}
    log_probs = logits_BV[rows].float().log_softmax(dim=-1)
    most = min(max(requests[row].logprobs or 0 for row in rows), log_probs.shape[1])
    values, indices = log_probs.topk(most, dim=-1)
    own = log_probs.gather(1, torch.tensor([[tokens[row]] for row in rows], device=log_probs.device))[:, 0].tolist()
    pairs = [list(zip(*columns, strict=True)) for columns in zip(indices.tolist(), values.tolist(), strict=True)]
    return {row: (own[number], tuple(pairs[number][: requests[row].logprobs or 0])) for number, row in enumerate(rows)}
