"""Running a mixture on text to measure how its routers spread tokens over the experts."""

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
    """Return what a mixture's routers do on token arrays (tokens,)."""
    load: list[Any] = []
    gates: list[Any] = []
    entropy: list[Any] = []
    tokens = 0
    with torch.inference_mode(), watching(model) as log:
        for block in blocks:
            model(input_ids=torch.from_numpy(block[None]).to(model.device), use_cache=False)
            layers = log.layers()
            count = len(block)
            load.append(torch.stack([one.load() for one in layers]) * count)
            gates.append(torch.stack([one.mean_gates() for one in layers]) * count)
            entropy.append(torch.stack([one.entropy() for one in layers]) * count)
            tokens += count

    def mean(parts: list[Any]) -> Any:
        return (torch.stack(parts).sum(dim=0) / max(tokens, 1)).tolist()

    return DomainRouting(
        tokens,
        tuple(tuple(row) for row in mean(load)),
        tuple(tuple(row) for row in mean(gates)),
        tuple(mean(entropy)),
    )
