"""Reading windows of text with a model: keys, predictions and the tokens that follow. Shapes: M = tokens, d = width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from ...core.models.decoding.memories.keys import KeyReader
from ...core.text.token_store import TokenWindows, Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096
BATCH_LOGITS = 1 << 26  # limits logits to 256 MiB of float32


def batch_size(model: PreTrainedModel, windows: TokenWindows) -> int:
    """Return the number of windows that are read at once."""
    tokens = min(BATCH_TOKENS, BATCH_LOGITS // int(model.config.get_text_config().vocab_size))
    return max(tokens // windows.context, 1)


def read_windows(
    model: PreTrainedModel, reader: KeyReader, batch: Windows
) -> tuple[torch.Tensor, torch.Tensor, NDArray[Any]]:
    """Return keys (M, d), logits (M, V) and tokens (M,) of the targets of a batch that count."""
    ids = torch.from_numpy(batch.tokens[:, :-1]).to(model.device)
    with torch.inference_mode(), reader.reading():
        logits = model(input_ids=ids, use_cache=False).logits
    scored = torch.from_numpy(batch.scored)
    keys = reader.take(ids.shape[1])[scored.to(model.device)]
    return keys.cpu(), logits[scored.to(model.device)], batch.tokens[:, 1:][batch.scored]
