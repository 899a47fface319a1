"""Fitting how much a memory counts: the weight and the temperature with the highest likelihood of validation text.

For each temperature on a grid around the median distance, the likelihood is concave in the weight, whose maximum is found by
expectation maximisation. Shapes: M = tokens, k = neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.errors import UserError
from ...core.models.decoding.memories.keys import KeyReader
from ...core.models.decoding.memories.manifest import MemoryFit
from ...core.models.decoding.memories.search import Datastore, Neighbours, search_all
from ...core.reporting import SILENT, Reporter
from ...core.text.token_store import TokenWindows
from .reading import batch_size, read_windows
from .settings import DEFAULT_K, FIT_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OCTAVES = range(-6, 5)
"""Temperatures are the median distance times powers of two."""
ROUNDS = 100
LARGEST_WEIGHT = 0.99
"""A weight of 1 would give tokens without a neighbour no probability."""


def fit_interpolation(
    model: PreTrainedModel,
    memories: Sequence[Path],
    texts: Mapping[str, TokenWindows],
    k: int = DEFAULT_K,
    tokens: int = FIT_TOKENS,
    reporter: Reporter = SILENT,
) -> MemoryFit:
    """Return the interpolation fitted on windows of validation text by domain, of each an equal share of `tokens`.

    Raises `UserError` for text of which no token counts.
    """
    stores = [Datastore(folder, reporter=reporter) for folder in memories]
    reader = KeyReader(model, stores[0].manifest.key)
    share = -(-tokens // len(texts))
    matches, distances, log_probs = [], [], []
    done = 0
    for domain, windows in texts.items():
        read = 0
        for batch in windows.batches(batch_size(model, windows)):
            keys, logits, targets = read_windows(model, reader, batch)
            wanted = torch.from_numpy(targets)
            neighbours = search_all(stores, keys, k)
            matches.append(neighbours.tokens == wanted[:, None])
            distances.append(neighbours.distances)
            log_probs.append(logits.float().log_softmax(-1).cpu().gather(1, wanted[:, None])[:, 0])
            read, done = read + len(targets), done + len(targets)
            reporter.progress("fitting", min(done, tokens), tokens, "tokens")
            if read >= share:
                break
        if not read:
            raise UserError(f"no token of the validation text of domain '{domain}' counts; fit on other domains")
    found = Neighbours(torch.cat(distances), torch.cat(matches).long())
    weight, temperature, best, plain = best_interpolation(found, torch.cat(log_probs))
    return MemoryFit(weight, temperature, k, tuple(texts), done, plain, best)


def best_interpolation(matches: Neighbours, log_probs_M: Tensor) -> tuple[float, float, float, float]:
    """Return the best weight and temperature, and the bits per token with and without neighbours.

    `matches.tokens` is 1 where a neighbour has the token that follows, (M, k).
    """
    finite = matches.distances[matches.distances.isfinite()]
    middle = float(finite.median()) if len(finite) else 1.0
    model_M = log_probs_M.double().exp()
    plain = -float(log_probs_M.double().mean()) / math.log(2)
    best = (0.0, max(middle, 1e-6), plain)
    for octave in OCTAVES:
        temperature = max(middle, 1e-6) * 2.0**octave
        shares = (-matches.distances.double() / temperature).softmax(dim=1).nan_to_num(0.0)
        neighbours_M = (shares * matches.tokens).sum(dim=1)
        weight = _best_weight(neighbours_M, model_M)
        bits = -float((weight * neighbours_M + (1 - weight) * model_M).log2().mean())
        if bits < best[2]:
            best = (weight, temperature, bits)
    return best[0], best[1], best[2], plain


def _best_weight(neighbours_M: Tensor, model_M: Tensor) -> float:
    weight = 0.5
    for _ in range(ROUNDS):
        mixed = weight * neighbours_M + (1 - weight) * model_M
        weight = min(float((weight * neighbours_M / mixed.clamp(min=1e-300)).mean()), LARGEST_WEIGHT)
    return weight
