"""The built-in evaluator against a count by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from expertctl.core.hooks.evaluation import Evaluator
from expertctl.core.models.loading import load_model
from expertctl.core.testing import fresh_plugins
from expertctl.core.text.token_store import EncodedDocument, TokenStore, TokenWindows, write_part


@pytest.mark.parametrize(("context", "stride"), [(4, 4), (7, 3), (100, 50)])
def test_bits_per_byte_and_perplexity_score_every_token_of_the_text_once(
    model_folder: Path, tmp_path: Path, context: int, stride: int
) -> None:
    """Separators are context, and are neither scored nor counted; a lost byte costs 8 bits."""
    ids = np.random.default_rng(0).integers(1, 300, 37).tolist()
    documents = [EncodedDocument("größer" * 5, ids[:20], lost_bytes=3), EncodedDocument("x", ids[20:])]
    write_part(tmp_path, documents, separator=0, vocabulary=300)
    stream = [0, *ids[:20], 0, *ids[20:], 0]
    model, _ = load_model(model_folder)
    total = 0.0
    with torch.no_grad():
        for target in range(1, len(stream)):
            if stream[target] == 0:
                continue
            # the first window that reaches the target, none of which begins beyond the last full one
            number = max(-(-(target - context) // stride), 0)
            begin = max(min(number * stride, len(stream) - 1 - context), 0)
            logits = model(input_ids=torch.tensor([stream[begin:target]])).logits[0, -1]
            total -= float(logits.double().log_softmax(-1)[stream[target]])
    windows = TokenWindows(TokenStore(tmp_path), context, stride)
    score = fresh_plugins().offer(Evaluator, "perplexity").evaluate(model, windows)
    assert score.tokens == len(ids)
    assert score.values["perplexity"] == pytest.approx(math.exp(total / score.tokens), rel=1e-5)
    assert score.values["bits_per_byte"] == pytest.approx((total / math.log(2) + 8 * 3) / (8 * 5 + 1), rel=1e-5)
