"""Decoding as papers write it: float64, no cache, no batches, no padding."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

Scores = Callable[[Sequence[int]], Tensor]
"""Scores of the next token after a text, (V,)."""


def double_model(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return copy.deepcopy(model)


def last_logits(model: PreTrainedModel, text: Sequence[int]) -> Tensor:
    return _last_logits(model, tuple(text))


@functools.cache
def _last_logits(model: PreTrainedModel, text: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(text)]), use_cache=False).logits[0, -1]
    return logits


def greedy(scores: Scores, prompt: Sequence[int], count: int) -> list[int]:
    """Return a continuation by the highest score of each token."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(scores(text).argmax()))
    return text[len(prompt) :]


def beam_search(scores: Scores, prompt: Sequence[int], count: int, beams: int) -> list[int]:
    """Return the continuation of `count` tokens with the highest sum of scores that so many beams find."""
    states = [(0.0, list(prompt))]
    for _ in range(count):
        candidates = []
        for total, text in states:
            values, tokens = scores(text).topk(beams)
            candidates += [
                (total + value, [*text, token]) for value, token in zip(values.tolist(), tokens.tolist(), strict=True)
            ]
        states = sorted(candidates, key=lambda state: -state[0])[:beams]
    return states[0][1][len(prompt) :]
