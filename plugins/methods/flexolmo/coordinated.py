"""Coordinated training: an owner's feed-forward network beside the frozen public one, with a two-way router.

FlexOlmo (arXiv:2507.07024, section 3.3). Shapes: B = batch, T = tokens, d = hidden size, L = layers. The
public row is fixed at 0: a softmax depends only on differences of logits, so an owner's row is relative to
the public one. Owners therefore need to share nothing but the seed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ....core.models.feed_forwards import feed_forwards, require_plain

BiasForm = Literal["clamp", "softplus", "none"]
"""How a bias stays non-positive: min(b, 0) from b = 0, as in the authors' code, or -softplus(b) from b = -3."""
SOFTPLUS_START = -3.0
"""A bias of -0.05, from where it can move either way; at b = 0 it would take a third of the owner's share at once."""


class OwnersLogit(nn.Module):
    """Owner's logit, row x + non-positive bias; a separate module for per-example gradients."""

    def __init__(self, row_d: Tensor, *, bias: BiasForm) -> None:
        super().__init__()
        self.form = bias
        self.row = nn.Parameter(row_d.clone())
        start = SOFTPLUS_START if bias == "softplus" else 0.0
        self.bias = nn.Parameter(torch.tensor(start), requires_grad=bias != "none")

    def non_positive_bias(self) -> Tensor:
        """Return the bias as the logit has it, shape ()."""
        return -nn.functional.softplus(self.bias) if self.form == "softplus" else self.bias.clamp(max=0)

    def forward(self, hidden_BTd: Tensor) -> Tensor:
        return hidden_BTd @ self.row + self.non_positive_bias()


class CoordinatedFeedForward(nn.Module):
    """p_public FFN_public(x) + p_own FFN_own(x); (p_public, p_own) = softmax(0, row x + non-positive bias)."""

    def __init__(self, public: nn.Module, row_d: Tensor, *, bias: BiasForm) -> None:
        super().__init__()
        self.public = public
        self.own = copy.deepcopy(public)
        self.public.requires_grad_(False)
        self.own.requires_grad_(True)
        self.logit = OwnersLogit(row_d, bias=bias)
        self.logits_BT: Tensor | None = None
        """Logits of the last forward pass; None without gradients."""

    def forward(self, hidden_BTd: Tensor) -> Tensor:
        logits_BT: Tensor = self.logit(hidden_BTd)
        self.logits_BT = logits_BT if torch.is_grad_enabled() else None
        share_BT1 = logits_BT.sigmoid().unsqueeze(-1)
        mixed: Tensor = torch.lerp(self.public(hidden_BTd), self.own(hidden_BTd), share_BT1)
        return mixed


def coordinate(model: nn.Module, rows_Ld: Tensor, *, bias: BiasForm) -> list[CoordinatedFeedForward]:
    """Replace each FFN by a coordinated one and freeze all else; return the modules in layer order."""
    model.requires_grad_(False)
    modules = []
    for layer, part in enumerate(feed_forwards(model)):
        require_plain(part.module)
        module = CoordinatedFeedForward(part.module, rows_Ld[layer], bias=bias)
        setattr(part.parent, part.attribute, module)
        modules.append(module)
    return modules


def z_loss(modules: Sequence[CoordinatedFeedForward]) -> Tensor:
    """Return the router z-loss: mean of logsumexp(logits)^2 over tokens and layers, shape ()."""
    means = []
    for module in modules:
        assert module.logits_BT is not None, "no forward pass with gradients yet"
        means.append(nn.functional.softplus(module.logits_BT).square().mean())
    return torch.stack(means).mean()
