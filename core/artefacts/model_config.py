"""Settings in the `config.json` of a model, which multimodal models and containers nest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import read_json

FP8_REMEDY = "fp8 with 'weight_block_size' is converted by a mergekit file with `merge_method: passthrough` and `dtype: bfloat16`"
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Keys for the number of decoder layers."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the decoder: those of a container's members, or of a multimodal model's text part.

    A key that the text part does not have is the model's.
    """
    member: Mapping[str, Any] = config.get("member", config)
    nested = member.get("text_config")
    return {**member, **nested} if isinstance(nested, Mapping) else member


def with_floats(value: Any) -> Any:
    """Return a configuration with infinities and NaN in place of their notation in `config.json`."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: with_floats(part) for key, part in value.items()}
    return [with_floats(part) for part in value] if isinstance(value, list) else value


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration ties the output head to the embedding, which is transformers' default."""
    return bool(text_config(config).get("tie_word_embeddings", True))


def embedding_rows(folder: Path) -> int | None:
    """Return the number of token ids that the model in a folder can read; None without a `config.json` that says so."""
    path = folder / "config.json"
    rows = text_config(read_json(path)).get("vocab_size") if path.is_file() else None
    return rows if isinstance(rows, int) else None


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `quantization_config` of a model, empty if its weights are plain numbers."""
    stated = text_config(config).get("quantization_config")
    return stated if isinstance(stated, Mapping) else {}


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `UserError` for a quantized model, whose stored numbers are codes."""
    if stated := quantization(config):
        raise UserError(
            f"{folder} is quantized ({stated.get('quant_method', 'unknown method')}): its tensors are codes, not weights; "
            f"use the original model ({FP8_REMEDY})"
        )
