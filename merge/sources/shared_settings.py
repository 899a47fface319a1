"""Configuration keys that containers copy from their members, for generation and serving."""

from __future__ import annotations

SHARED_SETTINGS = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
