"""Averages of weights, against a naive mean of what every step left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expertctl.core.config.settings import TrainingConfig
from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part
from expertctl.experts.runs.trainable import all_parameters
from expertctl.experts.training.checkpointing import restore_latest, save_checkpoint
from expertctl.experts.training.steps.averaging import WeightAverage
from expertctl.experts.training.steps.loop import TrainingLoop

CONFIG = TrainingConfig(tokens=2 * 8 * 20, sequence_length=8, batch_size=2, learning_rate=3e-3, device="cpu")
SETTINGS: list[dict[str, Any]] = [
    {"average": "last", "average_points": 4, "average_every": 3},
    {"average": "last", "average_points": 50, "average_every": 1},
    {"average": "last", "average_points": 1},
    {"average": "ema", "average_decay": 0.8},
]


@pytest.fixture
def blocks(tmp_path: Path) -> TokenBlocks:
    ids = np.random.default_rng(0).integers(1, 32, size=(30, 9)).tolist()
    write_part(tmp_path, [EncodedDocument("x", row) for row in ids], separator=0, vocabulary=32)
    return TokenBlocks(TokenStore(tmp_path), CONFIG.sequence_length)


def loop_of(blocks: TokenBlocks, settings: dict[str, Any]) -> TrainingLoop:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return TrainingLoop(all_parameters(model), blocks, CONFIG.model_copy(update=settings))


def naive(settings: dict[str, Any], history: list[torch.Tensor]) -> torch.Tensor:
    if settings["average"] == "last":
        config = CONFIG.model_copy(update=settings)
        steps = [CONFIG.steps - number * config.average_every for number in range(config.average_points)]
        return torch.stack([history[step - 1].double() for step in steps if step > 0]).mean(dim=0)
    mean = history[0].double()
    for number, weights in enumerate(history[1:], start=2):
        share = max(1 - settings["average_decay"], 1 / number)
        mean = (1 - share) * mean + share * weights.double()
    return mean


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_average_is_the_naive_one(settings: dict[str, Any], blocks: TokenBlocks) -> None:
    loop = loop_of(blocks, settings)
    history = []
    for _ in loop.steps():
        history.append({name: parameter.detach().clone() for name, parameter in loop.parameters.items()})
    loop.average.apply(loop.parameters)
    for name, parameter in loop.parameters.items():
        expected = naive(settings, [weights[name] for weights in history])
        torch.testing.assert_close(parameter.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("stop", [3, 14])
def test_it_goes_on_from_a_checkpoint_with_the_same_bits(
    settings: dict[str, Any], stop: int, blocks: TokenBlocks, tmp_path: Path
) -> None:
    straight, first, second = (loop_of(blocks, settings) for _ in range(3))
    list(straight.steps())
    for report in first.steps():
        if report.step == stop:
            save_checkpoint(first, tmp_path / "state", {})
            break
    assert restore_latest(second, tmp_path / "state", {}) == stop
    list(second.steps())
    assert straight.average.tensors.keys() == second.average.tensors.keys()
    for name, tensor in straight.average.tensors.items():
        assert torch.equal(tensor, second.average.tensors[name])


def test_without_one_the_last_weights_stay(blocks: TokenBlocks) -> None:
    loop = loop_of(blocks, {})
    list(loop.steps())
    before = {name: parameter.detach().clone() for name, parameter in loop.parameters.items()}
    loop.average.apply(loop.parameters)
    assert loop.average_state() == {}
    assert all(torch.equal(before[name], parameter) for name, parameter in loop.parameters.items())


def test_the_last_of_the_points_is_the_end() -> None:
    average = WeightAverage(CONFIG.model_copy(update={"average": "last", "average_points": 3, "average_every": 4}))
    assert [average.number_at(step) for step in range(CONFIG.steps + 1)] == [0] * 12 + [1] * 4 + [2] * 4 + [3]
