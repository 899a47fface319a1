"""Tiny transformers models of several families, and loops that train them privately."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from expertctl.core.config.settings import DpConfig, TrainingConfig
from expertctl.core.hooks.training import TrainablePart
from expertctl.core.text.token_store import Blocks
from expertctl.experts.training.privacy.accounting import Mechanism
from expertctl.experts.training.privacy.loop import PrivateTrainingLoop
from expertctl.experts.training.privacy.noise import NoiseSource, seeded_source

USUAL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 64}
CONFIG = TrainingConfig(
    tokens=6 * 8 * 16, sequence_length=16, batch_size=4, accumulation=2, learning_rate=1e-2, device="cpu"
)
DP = DpConfig(epsilon=8, delta=1e-6)


def make_model(family: str, **further: Any) -> Any:
    """Return a model of the family in training mode, the same each time."""
    torch.manual_seed(0)
    match family:
        case "llama":
            model: nn.Module = LlamaForCausalLM(LlamaConfig(**USUAL, **further))
        case "tied":
            model = LlamaForCausalLM(LlamaConfig(**USUAL, tie_word_embeddings=True))
        case "olmo2":
            model = Olmo2ForCausalLM(Olmo2Config(**USUAL))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**USUAL, num_key_value_heads=1, head_dim=8))
        case "mixtral":
            model = MixtralForCausalLM(MixtralConfig(**USUAL, num_key_value_heads=1, num_local_experts=4))
        case _:
            model = GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=None, eos_token_id=None, **further))
    return model.train()


def private_loop(
    part: TrainablePart,
    blocks: Blocks,
    *,
    noise: float = 0.0,
    clip: float = float("inf"),
    config: TrainingConfig = CONFIG,
    source: NoiseSource | None = None,
) -> PrivateTrainingLoop:
    """Return a private loop with a mechanism of the test's choice."""
    rate = config.batch_size * config.accumulation / len(blocks)
    mechanism = Mechanism(noise, clip, rate, config.steps)
    return PrivateTrainingLoop(part, blocks, config, DP, mechanism, source or seeded_source(0))


def drawn(loop: PrivateTrainingLoop, step: int = 0) -> list[int]:
    """Return which blocks a step draws."""
    source = loop._source
    return [
        int(example) for example in source.sampled_indices(f"draw/{step}", len(loop._examples), loop.mechanism.rate)
    ]


def naive_gradients(loss: Any, parameters: dict[str, nn.Parameter], tokens: torch.Tensor) -> list[dict[str, Any]]:
    """Return each example's gradient, from a backward pass of its own."""
    each = []
    for row in range(len(tokens)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook")
            gradients = torch.autograd.grad(loss(tokens[row : row + 1]), list(parameters.values()), allow_unused=True)
        each.append(
            {
                name: torch.zeros_like(parameter) if gradient is None else gradient
                for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
            }
        )
    return each


def changed(config: TrainingConfig, **settings: Any) -> TrainingConfig:
    return config.model_copy(update=settings)


__all__ = ["CONFIG", "DP", "changed", "drawn", "make_model", "naive_gradients", "private_loop"]
