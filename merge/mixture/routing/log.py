"""Log and measure routing of any mixture class. Shapes: N = tokens, E = experts, k = experts per token."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import UserError

DEAD_SHARE = 0.01
"""An expert whose load in a layer is below this fraction of a balanced load counts as dead there."""


@dataclass(frozen=True)
class Decision:
    """Routing decision of one router in one forward pass."""

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
        """Return the mean gate of each expert over tokens, (E,)."""
        empty_NE = torch.zeros_like(self.logits, dtype=torch.float32)
        return empty_NE.scatter(-1, self.chosen, self.gates.float()).mean(dim=0)

    def load(self) -> Tensor:
        """Return each expert's share of the token assignments, (E,)."""
        counts = torch.bincount(self.chosen.flatten(), minlength=self.num_experts)
        return counts.float() / self.chosen.numel()

    def entropy(self) -> Tensor:
        """Return the mean entropy of the softmax over all experts, in nats, shape ()."""
        log_probabilities = self.logits.float().log_softmax(dim=-1)
        return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()


def routers_of(model: nn.Module) -> dict[str, Any]:
    """Return routers by module name, in layer order; raises `UserError` for a model without routers."""
    routers = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Router") and hasattr(module, "top_k") and hasattr(module, "weight")
    }
    if not routers:
        raise UserError(f"{type(model).__name__} is not a mixture of experts: it has no router")
    return routers


class RoutingLog(ExitStack):
    """Log of the decisions of a model's routers in the last forward pass; as a context, it is detached at the end."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decisions: dict[nn.Module, Decision] = {}
        """By router, in layer order."""
        for router in routers_of(model).values():
            self.enter_context(router.register_forward_hook(self._record))

    def _record(self, router: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        self.decisions[router] = Decision(*output[:3]) if len(output) > 2 else _dense_decision(router, *output)

    def layers(self) -> list[Decision]:
        return list(self.decisions.values())


def _dense_decision(router: Any, gates_NE: Tensor, logits_NE: Tensor) -> Decision:
    """Return the decision of a router that gives a gate to every expert, 0 to those that are not chosen, as Llama 4's."""
    chosen_Nk = logits_NE.topk(router.top_k, dim=-1).indices
    return Decision(logits_NE, gates_NE.gather(-1, chosen_Nk), chosen_Nk)


def routing_measures(decisions: list[Decision]) -> dict[str, float]:
    """Return router entropy in nats, highest and lowest load, and number of dead experts.

    Measured on the last batch. Entropy and loads are means over layers; dead experts are counted over all layers.
    Load is an expert's share of the gates times the number of experts, 1 if balanced. An expert can also count as
    dead because the batch has no text of its domain.
    """
    with torch.no_grad():
        gates = [decision.mean_gates() for decision in decisions]
        loads = [layer / layer.sum() * len(layer) for layer in gates]  # layers may differ in their number of experts
        entropy = torch.stack([decision.entropy() for decision in decisions]).mean()
    return {
        "router_entropy": float(entropy),
        "router_highest_load": float(torch.stack([load.max() for load in loads]).mean()),
        "router_lowest_load": float(torch.stack([load.min() for load in loads]).mean()),
        "router_dead_experts": float(sum(int((load < DEAD_SHARE).sum()) for load in loads)),
    }


def balance_loss(decisions: list[Decision], mean_over_processes: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return the load-balancing loss: the sum over layers of E sum_i u_i p_i.

    u_i is the mean gate of expert i and p_i its mean probability (Branch-Train-MiX, arXiv:2403.07816, section
    2.3). A balanced layer contributes 1. Where several processes have a part of the tokens each, the mean over processes of
    this loss and of its gradient is that of all tokens, given a function that returns the mean of a tensor over processes.
    """
    gates = [decision.mean_gates() for decision in decisions]
    probabilities = [decision.logits.float().softmax(dim=-1).mean(dim=0) for decision in decisions]
    if mean_over_processes is None:
        products = [(u_E * p_E).sum() for u_E, p_E in zip(gates, probabilities, strict=True)]
    else:
        sizes = [decision.num_experts for decision in decisions]
        all_gates, all_probabilities = mean_over_processes(
            torch.stack((torch.cat(gates).float(), torch.cat(probabilities))).detach()
        )
        products = [
            (u_E * all_p_E + all_u_E * p_E - all_u_E * all_p_E).sum()
            for u_E, p_E, all_u_E, all_p_E in zip(
                gates, probabilities, all_gates.split(sizes), all_probabilities.split(sizes), strict=True
            )
        ]
    return torch.stack(
        [decision.num_experts * product for decision, product in zip(decisions, products, strict=True)]
    ).sum()


def z_loss(decisions: list[Decision]) -> Tensor:
    """Return the z-loss (ST-MoE, arXiv:2202.08906, equation 5): mean of logsumexp(logits)^2 over tokens and layers."""
    return torch.stack([decision.logits.float().logsumexp(dim=-1).square().mean() for decision in decisions]).mean()


class SampledTop1:
    """Replaces the forward pass of a top-1 router by Gumbel-softmax sampling during training.

    Sample Top-1 of Branch-Train-MiX (section 2.3): the temperature is max(0.5, exp(-rate t)) at step t. In
    evaluation mode the router is an ordinary top-1 router.
    """

    def __init__(self, router: Any, rate: float) -> None:
        self.step = 0
        self._router, self._rate, self._original_forward = router, rate, router.forward
        router.forward = self

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        output: tuple[Tensor, ...] = self._original_forward(*inputs)
        if not self._router.training:
            return output
        temperature = max(0.5, math.exp(-self._rate * self.step))
        noisy_NE = torch.nn.functional.gumbel_softmax(output[0].float(), tau=temperature)
        gates_N1, chosen_N1 = noisy_NE.topk(1, dim=-1)
        return output[0], gates_N1.to(output[1].dtype), chosen_N1, *output[3:]


def train_with_all_experts(router: Any) -> None:
    """Make a router select all experts in training mode and its top k in evaluation mode."""
    top_k, original_forward = router.top_k, router.forward

    def forward(*inputs: Any, **named: Any) -> tuple[Tensor, ...]:
        router.top_k = router.num_experts if router.training else top_k
        output: tuple[Tensor, ...] = original_forward(*inputs, **named)
        return output

    router.forward = forward
