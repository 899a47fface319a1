"""A feed-forward for each domain over shared layers: each sequence passes through that of its own domain.

DEMix (arXiv:2108.05036, section 2). Shapes: B = batch, T = tokens, d = width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ....core.models.feed_forwards import feed_forwards


class DomainFeedForward(nn.Module):
    """As many feed-forwards as domains; `domains` says which each row of the batch passes through."""

    def __init__(self, start: nn.Module, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([start, *(copy.deepcopy(start) for _ in range(count - 1))])
        self.domains: tuple[int, ...] = (0,)
        """One for each row, or one for all."""

    def forward(self, hidden_BTd: Tensor) -> Tensor:
        rows = self.domains * len(hidden_BTd) if len(self.domains) == 1 else self.domains
        assert len(rows) == len(hidden_BTd), "a domain for each row of the batch"
        result_BTd = torch.empty_like(hidden_BTd)
        for domain in sorted(set(rows)):
            mine = [row for row, own in enumerate(rows) if own == domain]
            result_BTd[mine] = self.experts[domain](hidden_BTd[mine])
        return result_BTd


def divide(model: nn.Module, count: int) -> list[DomainFeedForward]:
    """Put `count` feed-forwards in place of each of a model's, all beginning as it; return them, first layer first."""
    found = []
    for part in feed_forwards(model):
        divided = DomainFeedForward(part.module, count)
        setattr(part.parent, part.attribute, divided)
        found.append(divided)
    return found


def choose(parts: Sequence[DomainFeedForward], domains: Sequence[int]) -> None:
    """Say which domain each row of the next batch is of; one says it of all rows."""
    for part in parts:
        part.domains = tuple(domains)
