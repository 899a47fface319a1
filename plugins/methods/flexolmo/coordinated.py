"""Training to coordinate: an owner's feed-forward beside the frozen public one, joined by a router of two rows.

FlexOlmo (arXiv:2507.07024, section 3.3). Shapes: B = batch, T = tokens, d = width, L = layers. The public row is the
origin: a softmax sees only differences of logits, so the owner's row is its difference from the public one, and no two
owners need to agree on anything but the seed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ....core.models.feed_forwards import feed_forwards


class OwnersLogit(nn.Module):
    """row x + min(bias, 0). A layer of its own, so that its gradient can be told apart by example."""

    def __init__(self, row_d: Tensor, *, bias: bool) -> None:
        super().__init__()
        self.row = nn.Parameter(row_d.clone())
        self.bias = nn.Parameter(torch.zeros(()), requires_grad=bias)

    def forward(self, hidden_BTd: Tensor) -> Tensor:
        return hidden_BTd @ self.row + self.bias.clamp(max=0)


class CoordinatedFeedForward(nn.Module):
    """p_public FF_public(x) + p_own FF_own(x), with (p_public, p_own) = softmax(0, row x + min(bias, 0))."""

    def __init__(self, public: nn.Module, row_d: Tensor, *, bias: bool) -> None:
        super().__init__()
        self.public = public
        self.own = copy.deepcopy(public)
        self.public.requires_grad_(False)
        self.own.requires_grad_(True)
        self.logit = OwnersLogit(row_d, bias=bias)
        self.logits_BT: Tensor | None = None
        """Of the last forward pass that gradients can follow."""

    @property
    def row(self) -> nn.Parameter:
        return self.logit.row

    @property
    def bias(self) -> nn.Parameter:
        return self.logit.bias

    def forward(self, hidden_BTd: Tensor) -> Tensor:
        logits_BT: Tensor = self.logit(hidden_BTd)
        self.logits_BT = logits_BT if torch.is_grad_enabled() else None
        share_BT1 = logits_BT.sigmoid().unsqueeze(-1)
        mixed: Tensor = torch.lerp(self.public(hidden_BTd), self.own(hidden_BTd), share_BT1)
        return mixed


def coordinate(model: nn.Module, rows_Ld: Tensor, *, bias: bool) -> list[CoordinatedFeedForward]:
    """Put a coordinated feed-forward in place of each of a model's, freezing all else; return them, first layer first."""
    model.requires_grad_(False)
    found = []
    for layer, part in enumerate(feed_forwards(model)):
        joined = CoordinatedFeedForward(part.module, rows_Ld[layer], bias=bias)
        setattr(part.parent, part.attribute, joined)
        found.append(joined)
    return found


def z_loss(parts: Sequence[CoordinatedFeedForward]) -> Tensor:
    """Return the mean over tokens and layers of logsumexp(logits)^2, which keeps router logits small, shape ()."""
    means = []
    for part in parts:
        assert part.logits_BT is not None, "no forward pass with gradients yet"
        means.append(nn.functional.softplus(part.logits_BT).square().mean())
    return torch.stack(means).mean()
