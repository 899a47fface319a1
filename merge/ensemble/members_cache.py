"""Key-value caches of several models that read the same text."""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache


class MembersCache(Cache):
    """Cache for `generate()` that holds a key-value cache of equal length per model."""

    def __init__(self, num_members: int) -> None:
        super().__init__(layers=[])
        self.members = [DynamicCache() for _ in range(num_members)]

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
