"""Named sizes and families of seed models pretrained from scratch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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
    "tiny": Preset(128, 352, 4, 4, 2048, 1024),  # about 1.3 million parameters as Llama, without a tied head
    "small": Preset(256, 704, 6, 8, 4096, 2048),  # 7 million
    "base": Preset(512, 1408, 8, 8, 8192, 2048),  # 34 million
    "medium": Preset(768, 2048, 12, 12, 32768, 2048),  # 135 million
    "large": Preset(1024, 2816, 24, 16, 32768, 4096),  # 376 million
}
FAMILIES = ("olmo2", "llama", "qwen3", "bloom")
"""transformers' model types. Bloom has linear biases of attention (ALiBi, arXiv:2108.12409) in place of positions, so that it reads
texts of any length; its feed-forward networks are of four times the hidden size."""


def preset(name: str) -> Preset:
    """Return a preset by name; raises `UserError` that lists the presets if it is unknown."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


def model_config(size: Preset, family: str, separator: int, vocabulary: int, *, tied: bool = False) -> PretrainedConfig:
    """Return the transformers configuration of a preset as a model of a family; `tied` shares input and output embedding.

    `vocabulary` is the tokenizer's vocabulary size, which is below the preset's if there was little text. Raises `UserError` for an
    unknown family.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if family not in FAMILIES:
        raise unknown_name("family", family, FAMILIES)
    settings: dict[str, Any] = {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]],  # servers choose the class by it
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), separator),
    }
    if family == "bloom":
        names = {"hidden_size": size.hidden_size, "n_layer": size.num_hidden_layers, "n_head": size.num_attention_heads}
        return AutoConfig.for_model(family, **names, **settings)
    heads = {"num_key_value_heads": size.num_attention_heads}
    if family == "qwen3":
        heads["head_dim"] = size.hidden_size // size.num_attention_heads
    return AutoConfig.for_model(family, **asdict(size) | heads | settings)
