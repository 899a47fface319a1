"""Caches of several models that read the same text, and generation with them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from inspect import signature
from typing import Any

from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache


class MembersCache(Cache):
    """Cache for `generate()` that holds a cache of equal length per model, of the kind that its layers need."""

    def __init__(self, members: Sequence[PreTrainedModel]) -> None:
        super().__init__(layers=[])
        self.members = [DynamicCache(config=member.config) for member in members]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.members[0].get_seq_length(layer_idx)) if self.members else 0

    @property
    def is_compileable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for member in self.members:
            member.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for member in self.members:
            member.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        for member in self.members:
            member.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        for member in self.members:
            member.crop(tokens_to_remove)


class MembersGeneration(GenerationMixin):
    """Generation that reads the whole text again for each token where the models have no cache."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        """Return the inputs of the next step; without a cache, the whole text."""
        if past_key_values is None:
            next_sequence_length = None
            kwargs.pop("position_ids", None)
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )


def can_cache(members: Iterable[PreTrainedModel]) -> bool:
    """Return whether all models continue a text from `past_key_values`; warns about the first one that does not."""
    for member in members:
        takes_cache = "past_key_values" in signature(member.forward).parameters
        if not (takes_cache and member._supports_default_dynamic_cache()):  # MiniMax takes only a cache of its own
            warnings.warn(
                f"models of type '{member.config.model_type}' keep no keys and values in a common cache; the whole text is "
                "read again for each new token",
                stacklevel=2,
            )
            return False
    return True
