"""Settings in the `config.json` of a model, which multimodal models and containers nest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_json

LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Keys for the number of decoder layers."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the decoder: those of a container's members, or of a multimodal model's text part.

    A key that the text part does not have is the model's.
    """
    member: Mapping[str, Any] = config.get("member", config)
    nested = member.get("text_config")
    return {**member, **nested} if isinstance(nested, Mapping) else member


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration ties the output head to the embedding, which is transformers' default."""
    return bool(text_config(config).get("tie_word_embeddings", True))


def embedding_rows(folder: Path) -> int | None:
    """Return the number of token ids that the model in a folder can read; None without a `config.json` that says so."""
    path = folder / "config.json"
    rows = text_config(read_json(path)).get("vocab_size") if path.is_file() else None
    return rows if isinstance(rows, int) else None
