"""How a mixture's router spreads text over the experts: load, gates and entropy by layer and domain, dead experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

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


def routing_of(model: PreTrainedModel, blocks: Sequence[NDArray[Any]]) -> DomainRouting:
    """Return what a mixture's routers do on token arrays (tokens,)."""
    import torch

    from .routing import watching

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
