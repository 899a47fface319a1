"""Generation with models of which some keep no cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin


class UncachedGeneration(GenerationMixin):
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
