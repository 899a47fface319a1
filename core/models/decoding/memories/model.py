"""A model that interpolates its distribution with the tokens behind the nearest keys of memories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ....errors import UserError
from ..rows import DecodingRow, RowPass, RowsModel
from .interpolation import interpolate
from .keys import KeyReader
from .search import Datastore, search_all


class MemoryModel(RowsModel):
    """A row of one model, whose logits become the log-probabilities of the interpolation."""

    def __init__(
        self, base: PreTrainedModel, stores: Sequence[Datastore], *, k: int, temperature: float, lambda_: float
    ) -> None:
        """Wrap a model; raises `UserError` for memories with different keys."""
        kinds = {store.manifest.key for store in stores}
        if len(kinds) > 1:
            raise UserError(f"the memories have different keys, {' and '.join(sorted(kinds))}; build them again")
        super().__init__(base, [DecodingRow(base)], self._interpolated)
        self._reader = KeyReader(base, kinds.pop())
        self._stores, self._k, self._temperature, self._lambda = tuple(stores), k, temperature, lambda_

    def _read(self, *arguments: Any, **named: Any) -> RowPass:
        with self._reader.reading():
            return super()._read(*arguments, **named)

    def _interpolated(self, logits: Sequence[Tensor]) -> Tensor:
        (logits_BTV,) = logits
        batch, length, vocabulary = logits_BTV.shape
        queries_Qd = self._reader.take(length).flatten(0, 1).cpu()
        model_QV = logits_BTV.log_softmax(dim=-1).flatten(0, 1)
        parts = []
        for queries, log_probs in zip(torch.split(queries_Qd, _AT_ONCE), torch.split(model_QV, _AT_ONCE), strict=True):
            neighbours = search_all(self._stores, queries, self._k).to(log_probs.device)
            parts.append(interpolate(log_probs, neighbours, self._lambda, self._temperature))
        return torch.cat(parts).view(batch, length, vocabulary)


_AT_ONCE = 512
"""Distributions in float64 that are in memory at once."""
