"""Named sizes of seed models pretrained from scratch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ...core.errors import unknown_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Preset:
    """The size of a decoder-only transformer."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int


PRESETS = {
    "tiny": Preset(128, 352, 4, 4, 2048, 1024),  # about 1.3 million parameters
    "small": Preset(256, 704, 6, 8, 4096, 2048),  # about 7 million
}


def preset(name: str) -> Preset:
    """Return a preset by name; raises `UserError` that lists the presets if it is unknown."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


def model_config(size: Preset, family: str, separator: int, vocabulary: int) -> PretrainedConfig:
    """Return the transformers configuration of a preset as an OLMo 2 or Llama model.

    `vocabulary` is the tokenizer's vocabulary size, which is below the preset's if there was little text.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settings = asdict(size) | {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]],  # servers choose the class by it
        "num_key_value_heads": size.num_attention_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), separator),
    }
    return AutoConfig.for_model(family, **settings)
