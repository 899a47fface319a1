"""Cache layers that keep the first tokens of each text and the last ones.

Keys are stored without positions, and rotated to their place in the cache at each step, as in the paper.
Shapes: B = batch, H = heads, L = columns of the cache, q = new tokens, D = width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .rotation import Rotate


class Columns:
    """The columns that all layers hold: a mask, 0 for padding before a text, and their positions."""

    def __init__(self, mask_BL: Tensor) -> None:
        self.mask_BL = mask_BL

    @property
    def positions(self) -> Tensor:
        """Places of the tokens among those of the same text that are kept."""
        return (self.mask_BL.long().cumsum(dim=1) - 1).clamp(min=0)

    def evicted(self, count: int, sinks: int) -> Tensor:
        """Return the indices of the columns that stay without `count` of them, (B, L - count).

        Padding goes first, then the oldest tokens behind the text's first `sinks`.
        """
        padding_B1 = (self.mask_BL == 0).sum(dim=1, keepdim=True)
        tokens_B1 = (count - padding_B1).clamp(min=0)
        columns_L = torch.arange(self.mask_BL.shape[1], device=self.mask_BL.device)
        place_BL = columns_L - padding_B1 - sinks
        goes_BL = (columns_L < count - tokens_B1) | ((place_BL >= 0) & (place_BL < tokens_B1))
        return columns_L.expand_as(goes_BL)[~goes_BL].view(len(goes_BL), -1)


class SinkLayer(DynamicLayer):
    """A layer whose keys have the positions of their columns."""

    def __init__(self, rotate: Rotate, columns: list[Columns]) -> None:
        super().__init__()
        self._rotate, self._columns = rotate, columns
        self.keys: Tensor
        self.values: Tensor

    @classmethod
    def of(cls, layer: DynamicLayer, rotate: Rotate, columns: list[Columns]) -> SinkLayer:
        """Take over the content of a layer whose columns are `columns`."""
        new = cls(rotate, columns)
        new.lazy_initialization(layer.keys, layer.values)
        new.keys, new.values = rotate(layer.keys, -columns[0].positions), layer.values
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new tokens (B, H, q, D); return all keys at their positions, and all values."""
        positions_BL = self._columns[0].positions
        new = self._rotate(key_states, -positions_BL[:, -key_states.shape[-2] :])
        self.keys = torch.cat((self.keys, new), dim=-2)
        self.values = torch.cat((self.values, value_states), dim=-2)
        return self._rotate(self.keys, positions_BL), self.values

    def keep(self, columns_BL: Tensor) -> None:
        """Drop all columns but these."""
        index = columns_BL[:, None, :, None]
        self.keys, self.values = (
            tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))
            for tensor in (self.keys, self.values)
        )
