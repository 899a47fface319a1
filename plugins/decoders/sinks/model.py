"""A model with attention sinks: reads texts of any length with a cache of constant size.

Token t attends to the first tokens of its text and to the last ones up to itself. Positions are places in the cache, so the
model never sees one that is larger than the cache. Shapes: B = batch, T = tokens, L = columns of the cache, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ....core.errors import UserError
from ....core.models.adapters.prompts import prompt_of
from ....core.models.decoding.wrapped import UNLIMITED, OwnCache, WrappedModel, positions_of
from .layers import Columns, SinkLayer
from .rotation import Rotate, rotation_of


class SinksModel(WrappedModel):
    """A model that keeps `sinks` first tokens and a window of last tokens of each text."""

    def __init__(self, base: PreTrainedModel, sinks: int = 4, window: int | None = None) -> None:
        """Wrap a model with RoPE; raises `UserError` for other positions, and for more tokens than the model has positions."""
        positions = positions_of(base)
        if window is None:
            if positions == UNLIMITED:
                raise UserError("the model states no number of positions; set window")
            window = positions - sinks
        if window < 1 or sinks + window > positions:
            raise UserError(
                f"{sinks} sinks and a window of {window} tokens do not fit the model's {positions} positions; set a smaller window"
            )
        super().__init__(base, UNLIMITED)
        self.sinks, self.size = sinks, sinks + window
        members = _members(base)
        self._rotations: list[Rotate] = [rotation_of(member) for member in members]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SinksCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits for tokens (B, T), which may continue the texts in a cache.

        What exceeds the size of the cache is read token by token, since each token has a window of its own. `attention_mask` is 0
        for padding, which is on the left.
        """
        assert past_key_values is None or isinstance(past_key_values, SinksCache), "another model's cache"
        batch, length = input_ids.shape
        mask_BT = input_ids.new_ones(batch, length) if attention_mask is None else attention_mask[:, -length:]
        cache = SinksCache() if past_key_values is None else past_key_values
        first = min(self.size if cache.num_tokens == 0 else 1, length)
        logits: list[Tensor] = []
        for begin, end in zip((0, *range(first, length)), range(first, length + 1), strict=True):
            logits.append(self._step(input_ids[:, begin:end], mask_BT[:, begin:end], cache))
            if logits_to_keep:
                logits = [torch.cat(logits, dim=1)[:, -logits_to_keep:]]
        return CausalLMOutputWithPast(
            logits=torch.cat(logits, dim=1),
            past_key_values=cache if use_cache else None,
        )

    def _step(self, ids_Bt: Tensor, mask_Bt: Tensor, cache: SinksCache) -> Tensor:
        """Read tokens for which there is room, after what has to leave the cache; return their logits."""
        if cache.base is None:
            columns = Columns(mask_Bt)
        else:
            cache.evict(cache.columns[0].mask_BL.shape[1] + ids_Bt.shape[1] - self.size, self.sinks)
            columns = Columns(torch.cat((cache.columns[0].mask_BL, mask_Bt), dim=1))
        cache.columns[:] = [columns]
        output = self.base(
            input_ids=ids_Bt,
            attention_mask=columns.mask_BL,
            position_ids=columns.positions[:, -ids_Bt.shape[1] :],
            past_key_values=cache.base,
            use_cache=True,
        )
        _require_read(output.past_key_values)
        if cache.base is None:
            cache.take_over(output.past_key_values, self._rotations)
        cache.num_tokens += ids_Bt.shape[1]
        logits: Tensor = output.logits
        return logits


class SinksCache(OwnCache):
    """The base model's own cache, with layers that forget."""

    def __init__(self) -> None:
        super().__init__()
        self.base: Any = None
        self.columns: list[Columns] = []
        """One element: the columns of all layers, which hold this list."""

    def take_over(self, cache: Any, rotations: list[Rotate]) -> None:
        """Replace the layers of a cache that has read the begin of the texts, in place."""
        for part, rotate in zip(_parts(cache), rotations, strict=True):
            part.layers = [SinkLayer.of(layer, rotate, self.columns) for layer in part.layers]
            part.layer_class_to_replicate = None
        self.base = cache

    def evict(self, count: int, sinks: int) -> None:
        """Drop `count` columns of every text."""
        if count <= 0:
            return
        kept_BL = self.columns[0].evicted(count, sinks)
        for part in _parts(self.base):
            for layer in part.layers:
                layer.keep(kept_BL)
        self.columns[:] = [Columns(self.columns[0].mask_BL.gather(1, kept_BL))]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.base.reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.base.batch_repeat_interleave(repeats)
        self._select(torch.arange(len(self.columns[0].mask_BL)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.base.batch_select_indices(indices)
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        mask_BL = self.columns[0].mask_BL
        self.columns[:] = [Columns(mask_BL.index_select(0, rows.to(mask_BL.device)))]


def _members(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Return the models with layers of their own: the model, or its members; raises `UserError` for those that do not fit."""
    named: Any = getattr(model, "named_members", None)
    members = [model] if named is None else list(named.values())
    for member in members:
        if prompt_of(member) is not None:
            raise UserError("attention sinks do not fit a model that reads a prompt of its own before the text")
        _require_plain_layers(member)
    return members


@torch.no_grad()
def _require_plain_layers(model: PreTrainedModel) -> None:
    ids_BT = torch.ones(1, 1, dtype=torch.long, device=model.device)
    cache = getattr(model(input_ids=ids_BT, use_cache=True), "past_key_values", None)
    layers = cache.layers if isinstance(cache, Cache) else []
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        raise UserError(
            f"attention sinks do not fit models of type '{model.config.model_type}': not all of their layers attend to the whole "
            "text by keys and values; generate within the model's positions"
        )


def _require_read(cache: Any) -> None:
    """Raise `UserError` if a member of an ensemble has skipped tokens, which it would read at other positions later."""
    if any(tokens is not None for tokens in getattr(cache, "unread_tokens", ())):
        raise UserError("attention sinks need an ensemble whose experts all read every token; this one skips some")


def _parts(cache: Any) -> list[Any]:
    """Return the caches with layers: the cache, or those of members."""
    return list(getattr(cache, "members", None) or [cache])
