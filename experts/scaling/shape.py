"""The sizes of a dense decoder that memory and time depend on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError, unknown_name
from ..runs.presets import PRESETS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder whose layers are all alike."""

    layers: int
    hidden: int
    feed_forward: int
    vocabulary: int
    parameters: int
    multiplied: int
    """Parameters that each token is multiplied with: all matrices but the input embedding, unless it is the output layer too."""
    in_feed_forwards: int
    """Parameters of all feed-forward networks."""


SIZES: dict[str, dict[str, Any]] = {
    **{name: asdict(size) for name, size in PRESETS.items()},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "vocab_size": 100_352,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32_000,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 100_352,
    },
    "32b": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 100_352,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
}
"""Common sizes of Llama-like models: 1b to 32b are those of OLMo 2 (7b of Llama 2), 70b that of Llama 3."""


def named_shape(name: str) -> ModelShape:
    """Return the shape of a common size; raises `UserError` that lists them if it is unknown."""
    from transformers import LlamaConfig

    if name not in SIZES:
        raise unknown_name("size", name, SIZES)
    return shape_of(LlamaConfig(**SIZES[name], tie_word_embeddings=False))


def folder_shape(folder: Path) -> ModelShape:
    """Return the shape of a Hugging Face model folder; raises `UserError` for one that is no dense decoder."""
    from ...core.models.loading import read_config

    return shape_of(read_config(folder))


def shape_of(config: PretrainedConfig) -> ModelShape:
    """Count the parameters of a model without allocating any; raises `UserError` for a mixture of experts."""
    import torch
    from transformers import AutoModelForCausalLM

    from ...core.models.feed_forwards import feed_forwards

    if any(getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError("a plan needs a dense model: give the size of the seed, not of a mixture of experts")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() >= 2)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding
    inside = [parameter for network in feed_forwards(model) for parameter in network.module.parameters()]
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        feed_forward=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiplied=matrices - (0 if is_tied else embedding.numel()),
        in_feed_forwards=sum(parameter.numel() for parameter in inside),
    )
