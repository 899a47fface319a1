"""Rows of (model, context) that read the same text, and one distribution from their logits.

Contrastive decoding, context-aware decoding, DExperts and ensembles over retrieved documents differ only in the rows and in
how logits are combined. Each row has a cache of its own, which follows beams, and masks and positions of its own, since
contexts differ in length. Shapes: R = rows, B = batch, T = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...errors import UserError
from .wrapped import OwnCache, WrappedModel, positions_of

Combine = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class DecodingRow:
    """A model that reads the text after a context."""

    model: PreTrainedModel
    weight: float = 1.0
    """Factor of its logits in a weighted sum; of any sign."""
    contexts: tuple[tuple[int, ...], ...] = ((),)
    """Tokens that it reads before the text: the same for all texts of a batch, or one context for each."""


class RowsModel(WrappedModel):
    """A model whose logits combine those of several rows."""

    def __init__(
        self,
        base: PreTrainedModel,
        rows: Sequence[DecodingRow],
        combine: Combine | None = None,
        *,
        begin: Sequence[int] = (),
    ) -> None:
        """Wrap a model, which has the configuration and the vocabulary, by rows, of which it may be one.

        `combine` maps the rows' logits, R float32 tensors (B, T, V), to those of the result (default: the sum by the rows'
        weights). `begin` are the tokens that the tokenizer puts before a text; contexts go behind them.
        Raises `UserError` for contexts that leave no positions, and for models that predict fewer tokens.
        """
        self._require_positions(rows, len(begin))
        super().__init__(base, min(_positions_left(row, len(begin)) for row in rows))
        self.rows = tuple(rows)
        self.combine = combine or self._weighted_sum
        self.begin = tuple(begin)
        for row in rows:
            if (size := int(row.model.config.get_text_config().vocab_size)) < self.vocabulary:
                raise UserError(
                    f"{base.config.name_or_path or 'the model'} predicts {self.vocabulary} tokens and another model of the decoder "
                    f"{size}; all need those of the first"
                )
        self.models = nn.ModuleList(row.model for row in rows)

    @staticmethod
    def _require_positions(rows: Sequence[DecodingRow], begin: int) -> None:
        for row in rows:
            if (left := _positions_left(row, begin)) < 2:
                raise UserError(
                    f"the context of {max(map(len, row.contexts))} tokens leaves {max(left, 0)} of the model's "
                    f"{positions_of(row.model)} positions; shorten the context"
                )

    def _weighted_sum(self, logits: Sequence[Tensor]) -> Tensor:
        terms = (row.weight * logits_BTV for row, logits_BTV in zip(self.rows, logits, strict=True))
        return torch.stack(tuple(terms)).sum(dim=0)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RowsCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the combined logits for tokens (B, T), which may continue the texts in a cache.

        `attention_mask` is 0 for padding, which is on the left. `position_ids` are those of the mask.
        """
        assert past_key_values is None or isinstance(past_key_values, RowsCache), "another model's cache"
        batch, length = input_ids.shape
        if attention_mask is None:
            past = past_key_values.num_tokens if past_key_values is not None else 0
            attention_mask = input_ids.new_ones(batch, past + length)
        if bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
            raise ValueError("texts are padded on the left, and these have padding behind a token")
        mask_BT = attention_mask[:, -length:]
        passes = [
            self._read(
                row, input_ids, mask_BT, None if past_key_values is None else past_key_values.rows[number], use_cache
            )
            for number, row in enumerate(self.rows)
        ]
        kept = slice(-(logits_to_keep or length), None)
        vocabulary = self.vocabulary
        logits = self.combine([row.logits[:, kept, :vocabulary].to(input_ids.device).float() for row in passes])
        caches = [row.cache for row in passes if row.cache is not None]
        cache = None
        if use_cache and len(caches) == len(passes):
            cache = RowsCache() if past_key_values is None else past_key_values
            cache.rows = caches
            cache.num_tokens += length
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the base model predicts."""
        return int(self.config.get_text_config().vocab_size)

    def _read(
        self, row: DecodingRow, ids_BT: Tensor, mask_BT: Tensor, cache: RowCache | None, use_cache: bool | None
    ) -> RowPass:
        length = ids_BT.shape[1]
        if cache is None:
            ids_BT, mask_BL = self._with_contexts(row.contexts, ids_BT, mask_BT)
        else:
            mask_BL = torch.cat((cache.mask, mask_BT), dim=1)
        positions_BL = (mask_BL.long().cumsum(dim=1) - 1).clamp(min=0)
        inputs = {
            "input_ids": ids_BT,
            "attention_mask": mask_BL,
            "position_ids": positions_BL[:, -ids_BT.shape[1] :],
            "past_key_values": None if cache is None else cache.cache,
            "use_cache": bool(use_cache),
            "logits_to_keep": length,
        }
        taken = signature(row.model.forward).parameters
        device = row.model.device
        output = row.model(
            **{
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in inputs.items()
                if name in taken
            }
        )
        read = getattr(output, "past_key_values", None) if use_cache else None
        return RowPass(output.logits[:, -length:], None if read is None else RowCache(read, mask_BL))

    def _with_contexts(
        self, contexts: Sequence[Sequence[int]], ids_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the texts with contexts before them and their mask, (B, L); texts end together, as they did."""
        if not any(contexts):
            return ids_BT, mask_BT
        batch, length = ids_BT.shape
        if batch % len(contexts):
            raise UserError(f"{len(contexts)} contexts do not fit {batch} texts; give one, or one for each text")
        each = batch // len(contexts)  # beams and samples of a prompt follow each other
        texts = [
            self._join(contexts[number // each], ids_T[mask_T.bool()].tolist())
            for number, (ids_T, mask_T) in enumerate(zip(ids_BT, mask_BT, strict=True))
        ]
        longest = max(length, *map(len, texts))
        pad = int(ids_BT[0, 0])
        padded = ids_BT.new_tensor([[pad] * (longest - len(text)) + text for text in texts])
        mask = mask_BT.new_tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
        return padded, mask

    def _join(self, context: Sequence[int], text: list[int]) -> list[int]:
        """Return context and text, of which a begin of text comes before both."""
        if not context:
            return text
        begin = list(self.begin)
        begins = bool(begin) and text[: len(begin)] == begin
        return [*begin, *context, *(text[len(begin) :] if begins else text)]


@dataclass(frozen=True)
class RowPass:
    """What a row predicts, and its cache after it, if it keeps one."""

    logits: Tensor
    cache: RowCache | None


@dataclass(frozen=True)
class RowCache:
    """A row's own cache, and the mask of all that it has read, (B, L)."""

    cache: Any
    mask: Tensor


class RowsCache(OwnCache):
    """The caches of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[RowCache] = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change("reorder_cache", beam_idx, lambda mask: mask.index_select(0, beam_idx.to(mask.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change("batch_repeat_interleave", repeats, lambda mask: mask.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change("batch_select_indices", indices, lambda mask: mask[indices])

    def _change(self, method: str, argument: Any, change_mask: Callable[[Tensor], Tensor]) -> None:
        for row in self.rows:
            getattr(row.cache, method)(argument)
        self.rows = [RowCache(row.cache, change_mask(row.mask)) for row in self.rows]


def _positions_left(row: DecodingRow, begin: int) -> int:
    context = max(map(len, row.contexts))
    return positions_of(row.model) - (context + begin if context else 0)
