"""Caches of several models that read the same text."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from inspect import signature

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from ...core.models.serving.caches import append_rows, can_append, drop_columns


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

    # --- rows that come and go, for a server ---

    def can_append(self) -> bool:
        """Return whether rows can be appended."""
        return all(map(can_append, self.members))

    def append_rows(self, other: MembersCache) -> None:
        """Append the rows of another cache of the same models."""
        for member, new in zip(self.members, other.members, strict=True):
            append_rows(member, new)

    def drop_columns(self, count: int) -> None:
        """Remove columns on the left, which are padding in all rows."""
        for member in self.members:
            drop_columns(member, count)


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
