"""How a mixture's router spreads text over the experts: load, gates and entropy by layer and domain, dead experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEAD_SHARE = 0.01
"""An expert that gets less of the tokens than this share of an even load counts as dead in a layer."""


@dataclass(frozen=True)
class DomainRouting:
    """What the routers did on one domain."""

    tokens: int
    load: tuple[tuple[float, ...], ...]
    """By layer and expert: the share of the tokens' choices."""
    gates: tuple[tuple[float, ...], ...]
    """By layer and expert: the mean gate."""
    entropy: tuple[float, ...]
    """By layer, in nats, of the softmax over all experts."""

    def mean_load(self) -> list[float]:
        """Return each expert's load, the mean over layers."""
        return [sum(column) / len(self.load) for column in zip(*self.load, strict=True)]


@dataclass(frozen=True)
class RoutingReport:
    """What the routers of a mixture did on several domains."""

    experts: tuple[str, ...]
    domains: Mapping[str, DomainRouting]

    def dead(self) -> list[tuple[int, str]]:
        """Return (layer, expert) wherever an expert gets next to nothing in every domain."""
        limit = DEAD_SHARE / len(self.experts)
        layers = range(len(next(iter(self.domains.values())).load))
        return [
            (layer, name)
            for layer in layers
            for number, name in enumerate(self.experts)
            if all(one.load[layer][number] < limit for one in self.domains.values())
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "experts": list(self.experts),
            "domains": {
                name: {
                    "tokens": one.tokens,
                    "load": dict(zip(self.experts, one.mean_load(), strict=True)),
                    "load_by_layer": [list(row) for row in one.load],
                    "gates_by_layer": [list(row) for row in one.gates],
                    "entropy_by_layer": list(one.entropy),
                }
                for name, one in self.domains.items()
            },
            "dead": [{"layer": layer, "expert": expert} for layer, expert in self.dead()],
        }
