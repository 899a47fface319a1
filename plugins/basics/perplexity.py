"""The built-in `perplexity` evaluator: bits per byte and perplexity, with every token of the text scored once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ...core.hooks.evaluation import Evaluator, Metric, Score
from ...core.hooks.hookspecs import hookimpl
from ...core.models.scoring import scored_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...core.text.token_store import TokenWindows

BATCH_TOKENS = 4096
BATCH_LOGITS = 1 << 26  # limits the logits of several windows to 256 MiB of float32


BITS_PER_LOST_BYTE = 8


def evaluate(model: PreTrainedModel, windows: TokenWindows) -> Score:
    """Return the bits per byte and the perplexity per token of one part.

    Tokens between documents are context, but are not scored, whatever they are called in a vocabulary. A byte that the
    tokens do not give back costs 8 bits, as much as sending it beside them, so that a tokenizer gains nothing by losing
    text.
    """
    import torch

    batch_tokens = min(BATCH_TOKENS, BATCH_LOGITS // int(model.config.vocab_size))
    with torch.inference_mode():
        total, count = scored_loss(model, windows.batches(max(batch_tokens // windows.context, 1)), model.device)
    # exp overflows for a broken model
    perplexity = math.exp(total / count) if total / count < 700 else math.inf
    bits = total / math.log(2) + BITS_PER_LOST_BYTE * windows.lost_bytes
    return Score({"bits_per_byte": bits / windows.num_bytes, "perplexity": perplexity}, count)


@hookimpl
def evaluators() -> list[Evaluator]:
    metrics = (Metric("bits_per_byte", "bits per byte"), Metric("perplexity", "perplexity per token"))
    return [Evaluator("perplexity", "bits per byte of text and perplexity per token", metrics, evaluate)]
