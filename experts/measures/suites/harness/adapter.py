"""An artefact as a model of lm-eval.

It is lm-eval's own class for Hugging Face models around a model in memory, so that tokens, borders, truncation, windows of
long texts and stop sequences are as published numbers have them. Only import this where lm-eval is installed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lm_eval.models.huggingface import HFLM

from ..opening import OpenedModel

BATCH_LOGITS = 1 << 28
"""Limits the logits of a batch to 1 GiB of float32."""
MOST_TEXTS = 16


class ArtefactLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's `hf` model around an opened model, with the decoder's distribution if there is one."""

    def __init__(self, opened: OpenedModel) -> None:
        with _tied_already(opened.model):
            super().__init__(pretrained=opened.model, tokenizer=opened.tokenizer, backend="causal")
        # fewer than its config says if a prompt or a decoder takes positions
        self._max_length = min(self.max_length, opened.positions)
        vocabulary = int(opened.model.config.get_text_config().vocab_size)
        self.batch_size_per_gpu = max(min(BATCH_LOGITS // (vocabulary * self.max_length), MOST_TEXTS), 1)


@contextlib.contextmanager
def _tied_already(model: Any) -> Iterator[None]:
    """Keep the constructor from tying weights: the artefact was loaded as its manifest says."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights
