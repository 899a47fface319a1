"""Fit the cached prior over experts on validation text (arXiv:2208.03306).

The experts score blocks of each domain, and the prior for texts of that domain is the exponential moving average of
their posterior. A prior fitted on all domains at once would be near uniform by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import UserError
from ...core.hooks.merging import MergeInputs
from ...core.models.adapters.prompts import num_prompt_tokens
from ...core.models.kernels.posterior import PosteriorKind, cached_prior
from ...core.models.loading import load_model, max_positions
from ...core.models.scoring import token_log_probs
from ...core.process.compute import best_device, concurrently
from ...core.text.token_store import spread

if TYPE_CHECKING:
    from numpy import float32, int64
    from numpy.typing import NDArray

SAMPLES = 100  # number of blocks in the released evaluation


def fit_priors(inputs: MergeInputs, posterior: PosteriorKind, samples: int = SAMPLES) -> dict[str, dict[str, float]]:
    """Return the prior probability of each expert for texts of each domain: domain -> expert -> probability.

    Each is fitted on up to `samples` blocks of the domain. Raises `UserError` if there is no validation text.
    """
    import torch

    scored = validation_scores(inputs, samples, "the prior", f"{len(inputs.experts)} experts")
    priors = {}
    for domain, blocks in scored.items():
        scores = (torch.from_numpy(block.scores).double() for block in blocks)
        prior = cached_prior(scores, len(inputs.experts), posterior).double()
        priors[domain] = dict(zip(inputs.experts, (prior / prior.sum()).tolist(), strict=True))
    return priors


def mean_prior(priors: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the prior for a text whose domain is not known: the mean of the domains' priors."""
    experts = next(iter(priors.values()))
    return {expert: sum(prior[expert] for prior in priors.values()) / len(priors) for expert in experts}


@dataclass(frozen=True)
class ScoredBlock:
    """Block of validation text with its log-probabilities under each expert."""

    tokens: NDArray[int64]
    """Token ids, (T + 1,)."""
    scores: NDArray[float32]
    """Log-probabilities of all tokens but the first, per expert, (K, T)."""


def validation_scores(inputs: MergeInputs, samples: int, fitted: str, owner: str) -> dict[str, list[ScoredBlock]]:
    """Return up to `samples` blocks of each domain, evenly spaced in its validation text and scored by all experts.

    `fitted` names the quantity to fit in messages, `owner` what it belongs to. Raises `UserError` without validation text.
    """
    import numpy as np
    import torch

    validation = inputs.validation()
    if not validation:
        raise UserError(f"{fitted} is fitted on validation text, and there is none; run `expertctl data prepare`")
    chosen = {text.domain: list(spread(text.blocks, samples)) for text in validation}
    room = max_positions(inputs.seed) - max(map(num_prompt_tokens, inputs.experts.values()))
    if any(len(block) > room + 1 for blocks in chosen.values() for block in blocks):
        inputs.reporter.say(f"blocks are shortened to {room} tokens, which the experts' longest prompt leaves")
        chosen = {domain: [block[: room + 1] for block in blocks] for domain, blocks in chosen.items()}
    count = sum(len(blocks) for blocks in chosen.values())
    inputs.reporter.say(f"fitting {fitted} of {owner} on {count} blocks of {', '.join(chosen)}")

    def scores_of(folder: Path) -> dict[str, list[NDArray[float32]]]:
        model, _ = load_model(folder, seed=inputs.seed, dtype="float32", as_trained=False)
        model.to(best_device())
        with torch.inference_mode():
            return {
                domain: [
                    token_log_probs(model, torch.from_numpy(block)[None].to(model.device))[0].cpu().numpy()
                    for block in blocks
                ]
                for domain, blocks in chosen.items()
            }

    size = sum(file.stat().st_size for file in inputs.seed.glob("*.safetensors"))
    by_expert = concurrently(scores_of, inputs.experts.values(), bytes_each=size)
    return {
        domain: [
            ScoredBlock(block, np.stack([scores[domain][index] for scores in by_expert]))
            for index, block in enumerate(blocks)
        ]
        for domain, blocks in chosen.items()
    }
