"""Stitch layers (Branch-Train-Stitch, arXiv:2502.00075, section 3).

Shapes: B = batch, T = tokens, d = hidden size of the hub, e = hidden size of an expert.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

EXPERT_GATE_START = -4.0
"""Initial logit of the gates into experts: a gate of 0.018, so the hub contributes little."""


class Stitch(nn.Module):
    """Base class of stitch layers: gates computed from hub states, projections between hub and experts."""

    gate_start = 0.0
    """Initial logit of the gates."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gates, self.projections = nn.ModuleDict(), nn.ModuleDict()
        self.dropout = nn.Dropout(dropout)

    def reset(self) -> None:
        """Initialise projections as the identity (truncated where hidden sizes differ) and gates as constants."""
        for gate in self.gates.values():
            nn.init.zeros_(gate.get_parameter("weight"))
            nn.init.constant_(gate.get_parameter("bias"), self.gate_start)
        for projection in self.projections.values():
            nn.init.eye_(projection.get_parameter("weight"))

    def drop(self, disabled: Collection[str]) -> None:
        """Remove the gates and projections of experts."""
        for name in disabled:
            del self.gates[module_key(name)], self.projections[module_key(name)]


class ExpertsIntoHub(Stitch):
    """Adds a gated mean of the projected expert states to the hub, per channel.

    `h + strength * (sum_i g_i W_i h_i - (1 - g_0) h)` with `g` a softmax over hub and experts per channel.
    `strength` 1 is the paper's layer. It starts at 0, so that the hub's states are initially unchanged.
    """

    def __init__(self, width: int, experts: Mapping[str, int], dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.gates["hub"] = nn.Linear(width, width)
        for name, expert_width in experts.items():
            self.gates[module_key(name)] = nn.Linear(width, width)
            self.projections[module_key(name)] = nn.Linear(expert_width, width, bias=False)
        self.strength = nn.Parameter(torch.zeros(width))

    def forward(self, hub_BTd: Tensor, experts_BTe: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the hub's new states and the projected states of each expert, all (B, T, d)."""
        if not experts_BTe:
            return hub_BTd, {}
        gates = (self.gates["hub"], *(self.gates[module_key(name)] for name in experts_BTe))
        logits = [self.dropout(gate(hub_BTd)) for gate in gates]
        shares = torch.stack(logits).float().softmax(dim=0).to(hub_BTd.dtype)
        projected = {name: self.projections[module_key(name)](states) for name, states in experts_BTe.items()}
        mean = shares[0] * hub_BTd
        for share, states in zip(shares[1:], projected.values(), strict=True):
            mean = mean + share * states
        return hub_BTd + self.strength * (mean - hub_BTd), projected


class HubIntoExperts(Stitch):
    """Mixes hub states into each expert: `(1 - g_i) h_i + g_i W_i h`, with `g_i` a sigmoid per channel."""

    gate_start = EXPERT_GATE_START

    def __init__(self, width: int, experts: Mapping[str, int], dropout: float = 0.0) -> None:
        super().__init__(dropout)
        for name, expert_width in experts.items():
            self.gates[module_key(name)] = nn.Linear(width, expert_width)
            self.projections[module_key(name)] = nn.Linear(width, expert_width, bias=False)

    def forward(self, hub_BTd: Tensor, experts_BTe: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the new states of each expert, (B, T, e)."""
        new_states = {}
        for name, states in experts_BTe.items():
            gate = self.dropout(self.gates[module_key(name)](hub_BTd)).sigmoid()
            new_states[name] = states + gate * (self.projections[module_key(name)](hub_BTd) - states)
        return new_states


def module_key(name: str) -> str:
    """Return the module key of an expert; dots are escaped, since module names must not contain them."""
    return "expert_" + name.replace(".", "%2E")
