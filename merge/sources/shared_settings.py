"""What generation and serving look up in the configuration of a model that holds others: taken over from theirs."""

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
