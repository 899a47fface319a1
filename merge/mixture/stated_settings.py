"""A dense model's configuration with nothing left to defaults, since those of a mixture's class are others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core.errors import UserError, first_line

_EVERYWHERE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_HAVE_OTHER_DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "llama": (),
    "mistral": ("sliding_window",),
    "olmo2": ("pad_token_id", "eos_token_id"),
    "qwen2": ("sliding_window",),
    "qwen3": ("head_dim",),
}
"""What the dense class and the mixture's fill in differently, beside what all families have to say."""
_MAY_BE_NULL = ("sliding_window", "pad_token_id", "eos_token_id")


def with_all_stated(dense: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a `config.json` with what it leaves out as its own class in transformers fills it in.

    One that says all that matters, as every newer one does, is returned as it is, without loading transformers. Raises
    `UserError` for values that the class refuses.
    """
    return dense if _says_all(dense) else _as_its_class_reads(dense)


def _says_all(dense: Mapping[str, Any]) -> bool:
    special = _HAVE_OTHER_DEFAULTS.get(str(dense.get("model_type")))
    if special is None:
        return False
    if any(
        dense.get(key) is None and (key not in _MAY_BE_NULL or key not in dense)
        for key in _EVERYWHERE + special
    ):
        return False
    if dense.get("use_sliding_window") and dense.get("layer_types") is None:
        return False
    rope = dense.get("rope_parameters") or dense
    return "rope_theta" in rope


def _as_its_class_reads(dense: Mapping[str, Any]) -> Mapping[str, Any]:
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
            f"its config.json is not what transformers takes for '{kind}': {first_line(error)}"
        ) from None
    return found
