"""Routing report of a mixture: load, gates and entropy by layer and domain, and dead experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEAD_SHARE = 0.01
"""An expert whose load in a layer is below this fraction of a balanced load counts as dead there."""


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
