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
from expertctl.core.text.token_store import TokenBlocks, TokenStore, write_part


@pytest.mark.parametrize("block_size", [4, 7, 100])
def test_bits_per_byte_and_perplexity_score_every_token_once(
    model_folder: Path, tmp_path: Path, block_size: int
) -> None:
    """Each block is predicted from its own beginning on; the separators count as tokens and not as bytes."""
    ids = np.random.default_rng(0).integers(1, 300, 37).tolist()
    write_part(tmp_path, [("größer" * 5, ids[:20]), ("x", ids[20:])], separator=0, vocabulary=300)
    stream = [0, *ids[:20], 0, *ids[20:], 0]
    model, _ = load_model(model_folder)
    total = 0.0
    with torch.no_grad():
        for begin in range(0, len(stream) - 1, block_size):
            block = stream[begin : begin + block_size + 1]
            log_probs = model(input_ids=torch.tensor([block])).logits[0].double().log_softmax(-1)
            total -= sum(float(log_probs[t - 1, block[t]]) for t in range(1, len(block)))
    score = (
        fresh_plugins().offer(Evaluator, "perplexity").evaluate(model, TokenBlocks(TokenStore(tmp_path), block_size))
    )
    assert score.tokens == len(stream) - 1
    assert score.values["perplexity"] == pytest.approx(math.exp(total / score.tokens), rel=1e-5)
    assert score.values["bits_per_byte"] == pytest.approx(total / math.log(2) / (8 * 5 + 1), rel=1e-5)
