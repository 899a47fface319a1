"""DEMix layers: one feed-forward network per domain; each sequence uses the one of its domain.

DEMix (arXiv:2108.05036, section 2). Shapes: B = batch, T = tokens, d = hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ....core.models.feed_forwards import feed_forwards, require_plain


class DomainFeedForward(nn.Module):
    """One feed-forward network per domain, selected for each row of the batch by `domains`."""

    def __init__(self, start: nn.Module, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([start, *(copy.deepcopy(start) for _ in range(count - 1))])
        self.domains: tuple[int, ...] = (0,)
        """Domain index of each row, or one index for all rows."""

    def forward(self, hidden_BTd: Tensor) -> Tensor:
        rows = self.domains * len(hidden_BTd) if len(self.domains) == 1 else self.domains
        assert len(rows) == len(hidden_BTd), "`domains` needs one index per row of the batch"
        result_BTd = torch.empty_like(hidden_BTd)
        for domain in sorted(set(rows)):
            selected = [row for row, row_domain in enumerate(rows) if row_domain == domain]
            result_BTd[selected] = self.experts[domain](hidden_BTd[selected])
        return result_BTd


def split_by_domain(model: nn.Module, count: int) -> list[DomainFeedForward]:
    """Replace each feed-forward network by `count` copies; return the new modules in layer order."""
    modules = []
    for part in feed_forwards(model):
        require_plain(part.module)
        module = DomainFeedForward(part.module, count)
        setattr(part.parent, part.attribute, module)
        modules.append(module)
    return modules


def set_domains(modules: Sequence[DomainFeedForward], domains: Sequence[int]) -> None:
    """Set the domain index of each row of the next batch, or one index for all rows."""
    for module in modules:
        module.domains = tuple(domains)
