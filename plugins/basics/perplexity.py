"""The built-in `perplexity` evaluator: bits per byte and perplexity, with every token scored once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...core.hooks.evaluation import Evaluator, Metric, Score
from ...core.hooks.hookspecs import hookimpl
from ...core.models.scoring import total_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...core.text.token_store import TokenBlocks

BATCH_TOKENS = 4096
BATCH_LOGITS = 1 << 26  # limits the logits to 256 MiB of float32 for any vocabulary


def evaluate(model: PreTrainedModel, blocks: TokenBlocks) -> Score:
    """Return the bits per byte and the perplexity per token of one part.

    Each block's context is limited to the block and the token before it. Separators count as tokens, not as bytes.
    """
    import torch

    batch_tokens = min(BATCH_TOKENS, BATCH_LOGITS // int(model.config.vocab_size))
    with torch.inference_mode():
        batches = blocks.batches(max(batch_tokens // blocks.block_size, 1))
        total, count = total_loss(model, batches, model.device)
    # exp overflows for a broken model
    perplexity = math.exp(total / count) if total / count < 700 else math.inf
    values = {"bits_per_byte": total / math.log(2) / blocks.num_bytes, "perplexity": perplexity}
    return Score(values, count)


@hookimpl
def evaluators() -> list[Evaluator]:
    metrics = (Metric("bits_per_byte", "bits per byte"), Metric("perplexity", "perplexity per token"))
    return [Evaluator("perplexity", "bits per byte of text and perplexity per token", metrics, evaluate)]
