"""Stitch layers (Branch-Train-Stitch, arXiv:2502.00075, section 3).

Shapes: B = batch, T = tokens, d = width of the hub, e = width of an expert, n = experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

EXPERT_GATE_START = -4.0
"""Logit of the gates into experts at the start: 0.018 of what reaches them is the hub's."""


class Stitch(nn.Module):
    """Gates that look at the hub, and projections between its states and the experts'."""

    gate_start = 0.0
    """Logit of the gates where training begins."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.gates, self.projections = nn.ModuleDict(), nn.ModuleDict()
        self.dropout = nn.Dropout(dropout)

    def start_anew(self, names: Collection[str] | None = None) -> None:
        """Set gates and projections (of the named experts; default: everything) to where training begins.

        Projections pass states on as they are, as far as the widths allow; gates do not look at them yet.
        """
        wanted = {key_of(name) for name in names} if names is not None else None
        for key, gate in self.gates.items():
            if wanted is None or key in wanted:
                nn.init.zeros_(gate.get_parameter("weight"))
                nn.init.constant_(gate.get_parameter("bias"), self.gate_start)
        for key, projection in self.projections.items():
            if wanted is None or key in wanted:
                nn.init.eye_(projection.get_parameter("weight"))

    def drop(self, gone: Collection[str]) -> None:
        """Take experts out."""
        for key in keys_of(gone):
            del self.gates[key], self.projections[key]


class ExpertsIntoHub(Stitch):
    """Adds to each channel of the hub a gated mean of what the experts have there.

    `h + strength * (sum_i g_i W_i h_i - (1 - g_0) h)` with `g` a softmax over hub and experts for every channel. With a
    `strength` of 1 it is the paper's; it begins at 0, so that at first the hub is what it was.
    """

    def __init__(self, width: int, experts: Mapping[str, int], dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.gates["hub"] = nn.Linear(width, width)
        for name, inner in experts.items():
            self.gates[key_of(name)] = nn.Linear(width, width)
            self.projections[key_of(name)] = nn.Linear(inner, width, bias=False)
        self.strength = nn.Parameter(torch.zeros(width))

    def forward(self, hub_BTd: Tensor, experts_BTe: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the hub's new states, and those of the experts as the hub sees them (projected), both (B, T, d)."""
        if not experts_BTe:
            return hub_BTd, {}
        logits = [self.dropout(self.gates[key](hub_BTd)) for key in ("hub", *keys_of(experts_BTe))]
        gates = torch.stack(logits).float().softmax(dim=0).to(hub_BTd.dtype)
        projected = {name: self.projections[key_of(name)](states) for name, states in experts_BTe.items()}
        mean = gates[0] * hub_BTd
        for gate, states in zip(gates[1:], projected.values(), strict=True):
            mean = mean + gate * states
        return hub_BTd + self.strength * (mean - hub_BTd), projected


class HubIntoExperts(Stitch):
    """Gives each expert a gated part of the hub: `(1 - g_i) h_i + g_i W_i h`, with `g_i` a sigmoid for every channel."""

    gate_start = EXPERT_GATE_START

    def __init__(self, width: int, experts: Mapping[str, int], dropout: float = 0.0) -> None:
        super().__init__(dropout)
        for name, inner in experts.items():
            self.gates[key_of(name)] = nn.Linear(width, inner)
            self.projections[key_of(name)] = nn.Linear(width, inner, bias=False)

    def forward(self, hub_BTd: Tensor, experts_BTe: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the experts' new states, (B, T, e) each."""
        found = {}
        for name, states in experts_BTe.items():
            gate = self.dropout(self.gates[key_of(name)](hub_BTd)).sigmoid()
            found[name] = states + gate * (self.projections[key_of(name)](hub_BTd) - states)
        return found


def key_of(name: str) -> str:
    """Return what a module of an expert is called: names may hold dots, which modules' may not."""
    return "expert_" + name.replace(".", "%2E")


def keys_of(names: Collection[str]) -> list[str]:
    """Return what the modules of several experts are called, in order."""
    return [key_of(name) for name in names]
