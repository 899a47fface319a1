"""The metadata of a GGUF file: the sizes of the model, its RoPE, and its lineage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....core.hooks.evaluation import ExportInputs
from ....core.models.loading import read_config
from .families import Family

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from torch import Tensor


@dataclass(frozen=True)
class Metadata:
    """The configuration of a model, as GGUF writes it."""

    config: Any
    """Configuration of transformers."""
    architecture: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, model: ExportInputs, family: Family) -> Metadata:
        """Return the metadata of a model, with notes on what GGUF expresses differently."""
        config = read_config(model.files)
        metadata = cls(config, family.architecture, ())
        if metadata.context_length < config.max_position_embeddings:
            note = (
                f"llama.cpp has no sliding window for this family: the file states a context of {metadata.context_length:,} "
                f"tokens, the window, in place of {config.max_position_embeddings:,}"
            )
            return cls(config, family.architecture, (note,))
        return metadata

    @property
    def vocabulary_rows(self) -> int:
        """Number of rows of the embedding."""
        return int(self.config.vocab_size)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        stated = getattr(self.config, "head_dim", None)
        return int(stated or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def context_length(self) -> int:
        """Number of positions, at most a sliding window: up to there, attention with the window is full attention."""
        window = getattr(self.config, "sliding_window", None)
        layers = getattr(self.config, "layer_types", None)
        has_window = "sliding_attention" in layers if layers else window is not None
        positions = int(self.config.max_position_embeddings)
        return min(positions, window) if has_window and window is not None else positions

    def write(self, writer: GGUFWriter, model: ExportInputs) -> None:
        """Write everything but tokenizer and file type."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(self.vocabulary_rows)
        self._write_rope(writer)
        self._write_experts(writer)
        _write_lineage(writer, model)

    def _write_rope(self, writer: GGUFWriter) -> None:
        from gguf import RopeScalingType

        rope = self.config.rope_parameters
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])

    def _write_experts(self, writer: GGUFWriter) -> None:
        num_experts = getattr(self.config, "num_local_experts", None) or getattr(self.config, "num_experts", None)
        if not num_experts:
            return
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(self.config.num_experts_per_tok)
        if width := getattr(self.config, "moe_intermediate_size", None):
            writer.add_expert_feed_forward_length(width)
        if width := getattr(self.config, "shared_expert_intermediate_size", None):
            writer.add_expert_shared_feed_forward_length(width)


def _write_lineage(writer: GGUFWriter, model: ExportInputs) -> None:
    from gguf import GGUFType

    writer.add_type(GGUFType.MODEL)
    writer.add_name(model.name)
    if model.licence is not None:
        writer.add_license(model.licence)
    if model.base_models:
        writer.add_base_model_count(len(model.base_models))
        for number, base in enumerate(model.base_models):
            writer.add_base_model_name(number, base)
    if model.digest is not None:
        writer.add_string("expertctl.digest", model.digest)


def rope_factors(config: Any, head_dim: int) -> Tensor | None:
    """Return what llama.cpp divides the frequencies of RoPE by, shape (head_dim / 2,); None for plain RoPE.

    The scaling of Llama 3.1: long wavelengths are stretched by a factor, short ones are kept, those between interpolated.
    """
    import torch

    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors.float()
