"""Base class of models that change the next-token distribution of another one.

transformers' `generate()` works on them as on any model: with batches, beams, processors of logits and a cache.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ..adapters.prompts import prompt_tokens_of
from ..loading import POSITION_LIMITS
from .uncached import UncachedGeneration

UNLIMITED = 1 << 40


class WrappedModel(PreTrainedModel, UncachedGeneration, GenerationMixin):
    """A model whose `forward` changes what another one, `base`, predicts.

    `forward` takes `input_ids` (B, T), `attention_mask` (B, past + T), `past_key_values`, `use_cache` and `logits_to_keep`, and
    returns an output with `logits` (B, T or `logits_to_keep`, V) and `past_key_values`: an `OwnCache`, or None.
    """

    main_input_name = "input_ids"

    def __init__(self, base: PreTrainedModel, positions: int | None = None) -> None:
        """Wrap a model; `positions` is how many tokens of a text can be read (default: as many as by `base`)."""
        config = copy.deepcopy(base.config)
        config._attn_implementation = "eager"  # this class has no attention of its own
        limit = positions_of(base) if positions is None else positions
        for name in _limits_of(config) or POSITION_LIMITS[:1]:
            setattr(config, name, limit)
        super().__init__(config)
        self.base = base
        self.generation_config = base.generation_config
        self.positions = limit
        """How many tokens of a text can be read, with those that are generated."""
        self.eval()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` creates the cache


class OwnCache(Cache):
    """Base class of the caches of wrapped models, which hold other caches; `reorder` follows beams."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.num_tokens = 0
        """Number of tokens of the text that were read."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("the cache of a decoder cannot be cropped; generate without an assistant model")


def tokens_before_text(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that a tokenizer puts before every text, such as the begin of a document."""
    marked: list[int] = tokenizer("a")["input_ids"]
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tuple(marked[: marked.index(plain[0])])


def positions_of(model: PreTrainedModel) -> int:
    """Return how many tokens of a text a model can read: its positions without those that its own prompt takes."""
    config = model.config.get_text_config()
    limit: int = min((getattr(config, name) for name in _limits_of(config)), default=UNLIMITED)
    return limit - prompt_tokens_of(model)


def _limits_of(config: Any) -> list[str]:
    return [name for name in POSITION_LIMITS if isinstance(getattr(config, name, None), int)]
