"""Measurement and report of a mixture's routing: load, gates and entropy by layer and domain, and dead experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from .log import DEAD_SHARE, Decision, RoutingLog


@dataclass(frozen=True)
class DomainRouting:
    """Routing statistics of one domain."""

    tokens: int
    load: tuple[tuple[float, ...], ...]
    """Share of the token assignments, by layer and expert."""
    gates: tuple[tuple[float, ...], ...]
    """Mean gate, by layer and expert."""
    entropy: tuple[float, ...]
    """Mean entropy of the softmax over all experts in nats, by layer."""

    def mean_load(self) -> list[float]:
        """Return the mean load of each expert over layers."""
        return [sum(column) / len(self.load) for column in zip(*self.load, strict=True)]


def routing_of(model: PreTrainedModel, blocks: Sequence[NDArray[Any]]) -> DomainRouting:
    """Measure load, gates and entropy of a mixture's routers on token arrays of shape (tokens,)."""
    measures = (Decision.load, Decision.mean_gates, Decision.entropy)
    by_block: list[list[Tensor]] = []
    with torch.inference_mode(), RoutingLog(model) as log:
        for block in blocks:
            model(input_ids=torch.from_numpy(block[None]).to(model.device), use_cache=False)
            layers = log.layers()
            by_block.append([torch.stack([measure(layer) for layer in layers]) * len(block) for measure in measures])
    tokens = sum(map(len, blocks))
    load, gates, entropy = (
        (torch.stack(values).sum(dim=0) / max(tokens, 1)).tolist() for values in zip(*by_block, strict=True)
    )
    return DomainRouting(tokens, tuple(map(tuple, load)), tuple(map(tuple, gates)), tuple(entropy))


@dataclass(frozen=True)
class RoutingReport:
    """Routing statistics of a mixture on several domains."""

    experts: tuple[str, ...]
    domains: Mapping[str, DomainRouting]

    def dead(self) -> list[tuple[int, str]]:
        """Return (layer, expert) of all experts that are dead in every domain."""
        limit = DEAD_SHARE / len(self.experts)
        layers = range(len(next(iter(self.domains.values())).load))
        return [
            (layer, name)
            for layer in layers
            for number, name in enumerate(self.experts)
            if all(routing.load[layer][number] < limit for routing in self.domains.values())
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "experts": list(self.experts),
            "domains": {
                name: {
                    "tokens": routing.tokens,
                    "load": dict(zip(self.experts, routing.mean_load(), strict=True)),
                    "load_by_layer": [list(row) for row in routing.load],
                    "gates_by_layer": [list(row) for row in routing.gates],
                    "entropy_by_layer": list(routing.entropy),
                }
                for name, routing in self.domains.items()
            },
            "dead": [{"layer": layer, "expert": expert} for layer, expert in self.dead()],
        }
