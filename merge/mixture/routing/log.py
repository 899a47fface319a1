"""Watching the routers of a mixture, whichever class it is of. Shapes: N = tokens, E = experts, k = experts of a token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import UserError
from .report import DEAD_SHARE


@dataclass(frozen=True)
class Decision:
    """What one router decided in one forward pass."""

    logits: Tensor
    """(N, E)."""
    gates: Tensor
    """(N, k)."""
    chosen: Tensor
    """(N, k)."""

    @property
    def num_experts(self) -> int:
        return int(self.logits.shape[-1])

    def mean_gates(self) -> Tensor:
        """Return the mean over tokens of each expert's gate, (E,)."""
        empty_NE = torch.zeros_like(self.logits, dtype=torch.float32)
        return empty_NE.scatter(-1, self.chosen, self.gates.float()).mean(dim=0)

    def mean_probabilities(self) -> Tensor:
        """Return the mean over tokens of the softmax over all experts, (E,)."""
        return self.logits.float().softmax(dim=-1).mean(dim=0)

    def load(self) -> Tensor:
        """Return the share of the tokens' choices that each expert got, (E,)."""
        counts = torch.bincount(self.chosen.flatten(), minlength=self.num_experts)
        return counts.float() / self.chosen.numel()

    def entropy(self) -> Tensor:
        """Return the mean entropy of the softmax over all experts, in nats, shape ()."""
        log_probabilities = self.logits.float().log_softmax(dim=-1)
        return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()


def routers_of(model: nn.Module) -> dict[str, Any]:
    """Return a mixture's routers by name, first layer first; raises `UserError` for a model that has none."""
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Router") and hasattr(module, "top_k") and hasattr(module, "weight")
    }
    if not found:
        raise UserError(f"{type(model).__name__} is no mixture of experts: it has no router")
    return found


@dataclass
class RoutingLog:
    """The decisions of the last forward pass, a layer each."""

    decisions: dict[str, Decision] = field(default_factory=dict)

    def layers(self) -> list[Decision]:
        return list(self.decisions.values())


def attach_log(model: nn.Module) -> tuple[RoutingLog, list[Any]]:
    """Let routers note what they decide; returns the log, and handles that end it when removed."""
    log = RoutingLog()

    def hook(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            log.decisions[name] = Decision(*output)

        return note

    return log, [module.register_forward_hook(hook(name)) for name, module in routers_of(model).items()]


@contextmanager
def watching(model: nn.Module) -> Iterator[RoutingLog]:
    """Yield the log of a model's routers, as long as the context lasts."""
    log, handles = attach_log(model)
    try:
        yield log
    finally:
        for handle in handles:
            handle.remove()


def routing_measures(decisions: list[Decision]) -> dict[str, float]:
    """Return how the last tokens were spread: entropy in nats, highest and lowest load, experts that got next to nothing.

    Means over layers but for the count of dead experts. Load is an expert's share of the gates, times the number of experts: 1 where
    it is even. Loads are those of one batch, so that a dead expert may be one that its domain did not come up for.
    """
    with torch.no_grad():
        loads = torch.stack(
            [one.mean_gates() / one.mean_gates().sum() * one.num_experts for one in decisions]
        )
        entropy = torch.stack([one.entropy() for one in decisions]).mean()
    return {
        "router_entropy": float(entropy),
        "router_highest_load": float(loads.amax(dim=1).mean()),
        "router_lowest_load": float(loads.amin(dim=1).mean()),
        "router_dead_experts": float((loads < DEAD_SHARE).sum()),
    }


def balance_loss(decisions: list[Decision]) -> Tensor:
    """Return the sum over layers of E sum_i u_i p_i: u_i the mean gate of expert i, p_i its mean probability.

    Branch-Train-MiX (arXiv:2403.07816, section 2.3); 1 for each layer where the load is even.
    """
    return torch.stack(
        [one.num_experts * (one.mean_gates() * one.mean_probabilities()).sum() for one in decisions]
    ).sum()


def z_loss(decisions: list[Decision]) -> Tensor:
    """Return the mean over tokens and layers of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906, equation 5)."""
    return torch.stack([one.logits.float().logsumexp(dim=-1).square().mean() for one in decisions]).mean()


class SampledTop1:
    """Training's form of a top-1 router: Gumbel noise on the logits, the largest of the softmax kept.

    Branch-Train-MiX's Sample Top-1 (section 2.3): the temperature falls as max(0.5, exp(-rate t)) over steps t. When
    the model is used there is no noise, and the router is an ordinary top-1 router.
    """

    def __init__(self, router: Any, rate: float) -> None:
        self.step = 0
        self._router, self._rate, self._plain = router, rate, router.forward
        router.forward = self

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decided: tuple[Tensor, Tensor, Tensor] = self._plain(hidden)
        if not self._router.training:
            return decided
        temperature = max(0.5, math.exp(-self._rate * self.step))
        noisy_NE = torch.nn.functional.gumbel_softmax(decided[0].float(), tau=temperature)
        gates_N1, chosen_N1 = noisy_NE.topk(1, dim=-1)
        return decided[0], gates_N1.to(decided[1].dtype), chosen_N1


def train_with_all_experts(router: Any) -> None:
    """Let a router send tokens through all experts while the model trains, and through its top k when it is used."""
    usual, plain = router.top_k, router.forward

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router.top_k = router.num_experts if router.training else usual
        decided: tuple[Tensor, Tensor, Tensor] = plain(hidden)
        return decided

    router.forward = forward
