"""A dense model's configuration with nothing left to defaults, since those of a mixture's class are others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import UserError, first_line

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LLAMA_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_AS_MANY_AS_HEADS = "num_attention_heads"
_CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "max_position_embeddings": 2048,
        "num_key_value_heads": _AS_MANY_AS_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _LLAMA_ROPE,
    },
    "mistral": {
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _LLAMA_ROPE,
        "sliding_window": 4096,
    },
    "olmo2": {
        "eos_token_id": 50279,
        "max_position_embeddings": 2048,
        "num_key_value_heads": _AS_MANY_AS_HEADS,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA_ROPE,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _LLAMA_ROPE,
        "sliding_window": None,
    },
    "qwen3": {
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _LLAMA_ROPE,
    },
}
"""What classes of transformers fill in where a configuration is silent and the mixture's class would fill in something else.

Kept here because loading those classes takes longer than a whole merge; a test compares.
"""
_MAY_BE_NULL = ("sliding_window", "pad_token_id", "eos_token_id")
_ROPE = ("rope_parameters", "rope_theta", "rope_scaling")


def with_all_stated(dense: Mapping[str, Any], where: Path | str = "the seed") -> Mapping[str, Any]:
    """Return a `config.json` with what it leaves out as its own class in transformers fills it in.

    Families that are not listed here, and what is half said, are read by that class itself. Raises `UserError` for values
    that the class refuses.
    """
    filled = _filled_in(dense)
    return filled if _says_all(filled) else _as_its_class_reads(dense, where)


def _filled_in(dense: Mapping[str, Any]) -> Mapping[str, Any]:
    usual = _CLASS_DEFAULTS.get(str(dense.get("model_type")), {})
    missing = {key: value for key, value in usual.items() if key not in dense}
    if any(key in dense for key in _ROPE):
        missing.pop("rope_parameters", None)
    if missing.get("num_key_value_heads") == _AS_MANY_AS_HEADS:
        missing["num_key_value_heads"] = dense.get(_AS_MANY_AS_HEADS)
    if dense.get("use_sliding_window"):
        missing.pop("sliding_window", None)  # how wide it is depends on more
    return {**dense, **missing} if missing else dense


def _says_all(dense: Mapping[str, Any]) -> bool:
    usual = _CLASS_DEFAULTS.get(str(dense.get("model_type")))
    if usual is None:
        return False
    rope = dense.get("rope_parameters") or dense
    needed = {*_SIZES, *usual} - {"rope_parameters"}
    return (
        "rope_theta" in rope
        and all(dense.get(key) is not None or (key in _MAY_BE_NULL and key in dense) for key in needed)
        and not (dense.get("use_sliding_window") and dense.get("layer_types") is None)
    )


def _as_its_class_reads(dense: Mapping[str, Any], where: Path | str) -> Mapping[str, Any]:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = dict(dense)
    kind = settings.pop("model_type", None)
    if kind not in CONFIG_MAPPING:  # of a plugin that has told transformers nothing
        return dense
    try:
        found: Mapping[str, Any] = AutoConfig.for_model(kind, **settings).to_diff_dict()
    except Exception as error:  # whatever the class's checks raise
        raise UserError(
            f"config.json of {where} is not what transformers takes for '{kind}': {first_line(error)}"
        ) from None
    return found
