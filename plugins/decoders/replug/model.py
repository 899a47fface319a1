"""A model that reads a text behind each of several documents. Shapes: R = documents, B = batch, T = tokens, V = vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ....core.errors import UserError
from ....core.models.decoding.rows import DecodingRow, RowsCache, RowsModel
from ....core.models.decoding.wrapped import WrappedModel, positions_of
from .retriever import Document

Find = Callable[[Sequence[Sequence[int]]], Sequence[Sequence[Document]]]
NOTHING = Document((), 0.0)
"""For a text that finds no document: the model alone."""


@dataclass(frozen=True)
class DocumentRows:
    """The documents of the texts of a batch."""

    documents: Sequence[Sequence[Document]]

    def model(self, base: PreTrainedModel, begin: Sequence[int]) -> RowsModel:
        """Return the model that mixes the probabilities behind each document by its weight."""
        found = [list(row) or [NOTHING] for row in self.documents]
        count = max(map(len, found))
        # those that fill up a batch have no weight
        texts = [[*row, *[Document(row[0].tokens, float("-inf"))] * (count - len(row))] for row in found]
        rows = [DecodingRow(base, contexts=tuple(text[number].tokens for text in texts)) for number in range(count)]
        weights_BR = torch.tensor([[document.log_weight for document in text] for text in texts])
        return RowsModel(base, rows, partial(mixed, weights_BR), begin=begin)


def mixed(weights_BR: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the weighted sum of probabilities, (B, T, V); beams of a text follow each other."""
    batch = logits[0].shape[0]
    weights = weights_BR.to(logits[0].device).repeat_interleave(batch // len(weights_BR), dim=0)
    terms = [
        logits_BTV.log_softmax(dim=-1) + weights[:, number, None, None] for number, logits_BTV in enumerate(logits)
    ]
    return torch.stack(terms).logsumexp(dim=0)


class DocumentsModel(WrappedModel):
    """A model that reads retrieved documents before a text (REPLUG, arXiv:2301.12652, section 3).

    A text that is continued has the documents that its prompt finds. Text that is scored has others for every `stride` tokens,
    which the text before them finds, so that no token helps to find what predicts it.
    """

    def __init__(
        self, base: PreTrainedModel, find: Find, *, document_tokens: int, stride: int, begin: Sequence[int] = ()
    ) -> None:
        """Wrap a model; raises `UserError` if documents leave no positions."""
        positions = positions_of(base) - document_tokens - len(begin)
        if positions < 2:
            raise UserError(
                f"documents of {document_tokens} tokens leave {max(positions, 0)} of the model's {positions_of(base)} positions; "
                "give a smaller value of document_tokens"
            )
        super().__init__(base, positions)
        self._find, self._stride, self._begin = find, stride, tuple(begin)
        self._reader: RowsModel | None = None

    def generate(self, inputs: Tensor, attention_mask: Tensor | None = None, **named: Any) -> Any:
        """Generate as transformers does, with the documents of the prompts (B, T)."""
        self._reader = self._reading(inputs, attention_mask)
        try:
            return super().generate(inputs, attention_mask=attention_mask, **named)
        finally:
            self._reader = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DocumentsCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logarithm of the mixed probabilities for tokens (B, T), which may continue the texts in a cache."""
        if past_key_values is not None:
            return past_key_values.reader(input_ids, attention_mask, None, past_key_values, use_cache, logits_to_keep)
        if self._reader is None and not use_cache:
            logits = self._scored(input_ids, attention_mask)
            return CausalLMOutputWithPast(logits=logits[:, -(logits_to_keep or logits.shape[1]) :])
        reader = self._reader or self._reading(input_ids, attention_mask)
        output = reader(input_ids, attention_mask, use_cache=use_cache, logits_to_keep=logits_to_keep)
        if output.past_key_values is not None:
            output.past_key_values = DocumentsCache(reader, output.past_key_values)
        return output

    def _reading(self, ids_BT: Tensor, mask_BT: Tensor | None) -> RowsModel:
        """Return the model that reads the documents which texts find."""
        return DocumentRows(self._find(_without_padding(ids_BT, mask_BT))).model(self.base, self._begin)

    def _scored(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        pieces = []
        for begin in range(0, ids_BT.shape[1], self._stride):
            end = begin + self._stride
            before = None if mask_BT is None else mask_BT[:, :begin]
            found = self._find(_without_padding(ids_BT[:, :begin], before)) if begin else [()] * len(ids_BT)
            reader = DocumentRows(found).model(self.base, self._begin)
            mask = None if mask_BT is None else mask_BT[:, :end]
            pieces.append(reader(ids_BT[:, :end], mask).logits[:, begin:])
        return torch.cat(pieces, dim=1)


class DocumentsCache(RowsCache):
    """The caches behind each document, and the model that reads them on."""

    def __init__(self, reader: RowsModel, cache: RowsCache) -> None:
        super().__init__()
        self.reader, self.rows, self.num_tokens = reader, cache.rows, cache.num_tokens


def _without_padding(ids_BT: Tensor, mask_BT: Tensor | None) -> list[list[int]]:
    if mask_BT is None:
        texts: list[list[int]] = ids_BT.tolist()
        return texts
    return [ids_T[mask_T.bool()].tolist() for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]
