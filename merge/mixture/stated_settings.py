"""Make the defaults of a dense model's configuration explicit, since its mixture class has other defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import UserError, first_line

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SAME_AS_HEADS = "num_attention_heads"
_LLAMA: Mapping[str, Any] = {
    "max_position_embeddings": 2048,
    "num_key_value_heads": _SAME_AS_HEADS,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
_QWEN = {**_LLAMA, "max_position_embeddings": 32768, "num_key_value_heads": 32}
_CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "sliding_window": 4096},
    "olmo2": {**_LLAMA, "eos_token_id": 50279, "pad_token_id": 1, "rms_norm_eps": 1e-5},
    "qwen2": {**_QWEN, "sliding_window": None},
    "qwen3": {**_QWEN, "head_dim": 128},
}
"""Defaults of transformers' configuration classes that differ from those of the mixture class.

Copied here because importing those classes takes longer than a whole merge; a test compares them with transformers.
"""
_MAY_BE_NULL = ("sliding_window", "pad_token_id", "eos_token_id")
_ROPE = ("rope_parameters", "rope_theta", "rope_scaling")


def fill_config_defaults(dense: Mapping[str, Any], where: Path | str = "the seed") -> Mapping[str, Any]:
    """Return a `config.json` with missing settings set to the defaults of its transformers class.

    Families that are not listed here and incomplete configurations are read by that class itself. Raises
    `UserError` for values that the class rejects.
    """
    filled = _fill_listed_defaults(dense)
    return filled if _is_complete(filled) else _load_config(dense, where)


def _fill_listed_defaults(dense: Mapping[str, Any]) -> Mapping[str, Any]:
    defaults = _CLASS_DEFAULTS.get(str(dense.get("model_type")), {})
    missing = {key: defaults[key] for key in sorted(defaults) if key not in dense}
    if any(key in dense for key in _ROPE):
        missing.pop("rope_parameters", None)
    if missing.get("num_key_value_heads") == _SAME_AS_HEADS:
        missing["num_key_value_heads"] = dense.get(_SAME_AS_HEADS)
    if dense.get("use_sliding_window"):
        missing.pop("sliding_window", None)  # the window depends on further settings
    return {**dense, **missing} if missing else dense


def _is_complete(dense: Mapping[str, Any]) -> bool:
    defaults = _CLASS_DEFAULTS.get(str(dense.get("model_type")))
    if defaults is None:
        return False
    rope = dense.get("rope_parameters") or dense
    required = {*_SIZES, *defaults} - {"rope_parameters"}
    return (
        "rope_theta" in rope
        and all(dense.get(key) is not None or (key in _MAY_BE_NULL and key in dense) for key in required)
        and not (dense.get("use_sliding_window") and dense.get("layer_types") is None)
    )


def _load_config(dense: Mapping[str, Any], where: Path | str) -> Mapping[str, Any]:
    """Return the settings as the configuration class of transformers reads them."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = dict(dense)
    kind = settings.pop("model_type", None)
    if kind not in CONFIG_MAPPING:  # a family of a plugin that is not registered with transformers
        return dense
    try:
        config: Mapping[str, Any] = AutoConfig.for_model(kind, **settings).to_diff_dict()
    except Exception as error:  # the checks of configuration classes raise various exceptions
        raise UserError(f"transformers rejects config.json of {where} as '{kind}': {first_line(error)}") from None
    return config
