"""The built-in `perplexity` evaluator: bits per byte and perplexity, with every token of the text scored once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...core.hooks.evaluation import Division, Evaluator, Metric, Score
from ...core.hooks.hookspecs import hookimpl
from ...core.models.scoring import scored_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...core.text.token_store import TokenWindows

BATCH_TOKENS = 4096
BATCH_LOGITS = 1 << 26  # limits the logits of several windows to 256 MiB of float32


BITS_PER_LOST_BYTE = 8


def batch_size(model: PreTrainedModel, windows: TokenWindows) -> int:
    """Return the number of windows that are scored at once."""
    batch_tokens = min(BATCH_TOKENS, BATCH_LOGITS // int(model.config.vocab_size))
    return max(batch_tokens // windows.context, 1)


def score(windows: TokenWindows, losses: Sequence[tuple[float, int]]) -> Score:
    """Return the bits per byte and the perplexity per token of one part, by the loss and the targets of each batch.

    Tokens between documents are context, but are not scored, whatever they are called in a vocabulary. A byte that the
    tokens do not give back costs 8 bits, as much as sending it beside them, so that a tokenizer gains nothing by losing
    text.
    """
    total, count = math.fsum(loss for loss, _ in losses), sum(count for _, count in losses)
    # exp overflows for a broken model
    perplexity = math.exp(total / count) if total / count < 700 else math.inf
    bits = total / math.log(2) + BITS_PER_LOST_BYTE * windows.lost_bytes
    return Score({"bits_per_byte": bits / windows.num_bytes, "perplexity": perplexity}, count)


@hookimpl
def evaluators() -> list[Evaluator]:
    metrics = (Metric("bits_per_byte", "bits per byte"), Metric("perplexity", "perplexity per token"))
    division = Division(batch_size, scored_loss, score)
    summary = "bits per byte of text and perplexity per token"
    return [Evaluator("perplexity", summary, metrics, division.evaluate, division)]
