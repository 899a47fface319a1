"""Measure the routing of a mixture on text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .log import watching
from .report import DomainRouting

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel


def routing_of(model: PreTrainedModel, blocks: Sequence[NDArray[Any]]) -> DomainRouting:
    """Measure load, gates and entropy of a mixture's routers on token arrays of shape (tokens,)."""
    load: list[Any] = []
    gates: list[Any] = []
    entropy: list[Any] = []
    tokens = 0
    with torch.inference_mode(), watching(model) as log:
        for block in blocks:
            model(input_ids=torch.from_numpy(block[None]).to(model.device), use_cache=False)
            layers = log.layers()
            count = len(block)
            load.append(torch.stack([decision.load() for decision in layers]) * count)
            gates.append(torch.stack([decision.mean_gates() for decision in layers]) * count)
            entropy.append(torch.stack([decision.entropy() for decision in layers]) * count)
            tokens += count

    def mean(totals: list[Any]) -> Any:
        return (torch.stack(totals).sum(dim=0) / max(tokens, 1)).tolist()

    return DomainRouting(
        tokens, tuple(tuple(row) for row in mean(load)), tuple(tuple(row) for row in mean(gates)), tuple(mean(entropy))
    )
