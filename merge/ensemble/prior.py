"""Fit the cached prior over experts on validation text (arXiv:2208.03306).

The experts score blocks of every domain. The prior is the exponential moving average of their posterior. Each step of
the average uses one block of every domain, so that the last blocks do not bias the prior towards one domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import UserError
from ...core.hooks.merging import MergeInputs
from ...core.hooks.text import ValidationText
from ...core.models.loading import load_model
from ...core.models.posterior import PosteriorKind, cached_prior
from ...core.models.scoring import token_log_probs
from ...core.process.compute import best_device, concurrently
from ...core.text.token_store import spread

if TYPE_CHECKING:
    from numpy import float32, int64
    from numpy.typing import NDArray

SAMPLES = 100  # number of blocks in the released evaluation


def fit_prior(inputs: MergeInputs, posterior: PosteriorKind, samples: int = SAMPLES) -> dict[str, float]:
    """Return the prior probability of each expert; raises `UserError` if there is no validation text."""
    import torch

    batches = validation_scores(inputs, samples, "the prior", f"{len(inputs.experts)} experts")
    scores = [[torch.from_numpy(block.scores)[:, None] for block in batch] for batch in batches]
    prior = cached_prior(scores, len(inputs.experts), posterior).double()
    return dict(zip(inputs.experts, (prior / prior.sum()).tolist(), strict=True))


@dataclass(frozen=True)
class ScoredBlock:
    """Block of validation text with its log-probabilities under each expert."""

    tokens: NDArray[int64]
    """Token ids, (T + 1,)."""
    scores: NDArray[float32]
    """Log-probabilities of all tokens but the first, per expert, (K, T)."""


def validation_scores(inputs: MergeInputs, samples: int, fitted: str, owner: str) -> list[list[ScoredBlock]]:
    """Return batches of one block per domain, scored by all experts; raises `UserError` without validation text.

    `fitted` names the quantity to fit in messages, `owner` what it belongs to.
    """
    import numpy as np
    import torch

    validation = inputs.validation()
    if not validation:
        raise UserError(f"{fitted} is fitted on validation text, and there is none; run `expertctl data prepare`")
    batches = _sample(validation, samples)
    count = sum(len(batch) for batch in batches)
    domains = ", ".join(text.domain for text in validation)
    inputs.reporter.say(f"fitting {fitted} of {owner} on {count} blocks of {domains}")

    def scores_of(folder: Path) -> list[list[NDArray[float32]]]:
        model, _ = load_model(folder, seed=inputs.seed, dtype="float32", as_trained=False)
        model.to(best_device())
        with torch.inference_mode():
            return [
                [
                    token_log_probs(model, torch.from_numpy(block)[None].to(model.device))[0].cpu().numpy()
                    for block in batch
                ]
                for batch in batches
            ]

    size = sum(file.stat().st_size for file in inputs.seed.glob("*.safetensors"))
    by_expert = concurrently(scores_of, inputs.experts.values(), bytes_each=size)
    return [
        [
            ScoredBlock(block, np.stack([scores[step][index] for scores in by_expert]))
            for index, block in enumerate(batch)
        ]
        for step, batch in enumerate(batches)
    ]


def _sample(validation: Sequence[ValidationText], samples: int) -> list[list[NDArray[int64]]]:
    """Return batches of one block per domain, evenly spaced in each validation text."""
    rounds = max(samples // len(validation), 1)
    chosen = [list(spread(text.blocks, rounds)) for text in validation]
    longest = max(len(blocks) for blocks in chosen)
    return [[blocks[step % len(blocks)] for blocks in chosen] for step in range(longest)]
