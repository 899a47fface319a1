"""Compares the configurations of models: equal shapes do not make equal functions.

Eight heads of 8 and four heads of 16 have the same tensors; so have models with another activation or rotary base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...core.artefacts.model_config import with_floats
from ...core.errors import UserError

_WITHOUT_EFFECT = re.compile(
    r"_.*|architectures|transformers_version|.*dtype|auto_map|task_specific_params|quantization_config|unsloth.*"
    r"|use_cache|output_.*|return_dict|id2label|label2id|num_labels|problem_type|chunk_size_feed_forward|classifier_.*"
    r"|.*dropout.*|.*_pdrop|.*layerdrop|.*initializer.*|.*init_std|init_device|.*loss_coef.*|.*jitter_noise"
    r"|.*kernels|use_mambapy|use_mem_eff_path|pretraining_tp|summary_.*|gradient_checkpointing|model_max_length"
    # compared by shapes, layers and tensors
    r"|vocab_size|unpadded_vocab_size|tie_word_embeddings|num_hidden_layers|n_layers?|num_layers"
)
"""Settings of training, of metadata, and those that other checks compare."""
_IN_LAYER_TYPES = re.compile(r"max_window_layers|use_sliding_window|.*sliding_window_pattern")
"""Settings that transformers turns into `layer_types` and `sliding_window`."""
_MISSING = "(not stated)"
_FOR_GENERATION = re.compile(r".*_token_id|.*_token_index|max_position_embeddings|n_positions|max_sequence_length")
"""Settings outside the function of the weights, of which the output keeps the leading model's."""


def compare_configurations(
    leading: tuple[str, Path, Mapping[str, Any]], others: Mapping[str, tuple[Path, Mapping[str, Any]]], allowed: bool
) -> tuple[str, ...]:
    """Return notes on settings in which models differ from the leading one (name, folder, `config.json`).

    Raises `UserError` for settings that change the function of the weights, unless `allowed`.
    """
    name, folder, config = leading
    notes = []
    for other, (other_folder, other_config) in others.items():
        for key, (first, second) in _differences(config, other_config).items():
            values = f"{key} is {first!r} in '{name}' and {second!r} in '{other}'"
            is_harmless = _FOR_GENERATION.fullmatch(key.rpartition(".")[2])
            if not (is_harmless or allowed or _MISSING in (first, second)):
                raise UserError(
                    f"{values} ({folder / 'config.json'}, {other_folder / 'config.json'}): the same weights compute "
                    "different functions in these models (override: --allow-unrelated)"
                )
            notes.append(f"{values}; the output has that of '{name}'")
    return tuple(notes)


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings with an effect that differ, as (first, second) by dotted key."""
    settings = [dict(_with_effect(config)) for config in (first, second)]
    if settings[0] == settings[1] or first.get("model_type") != second.get("model_type"):
        return _unequal(*settings)
    # files leave out defaults, and state the rotary embedding in several ways
    complete = [_as_read_by_transformers(config) for config in (first, second)]
    if complete[0] is None or complete[1] is None:
        return _unequal(*settings)
    differences = _unequal(*(dict(_with_effect(config)) for config in complete if config is not None))
    return {key: pair for key, pair in differences.items() if not _IN_LAYER_TYPES.fullmatch(key.rpartition(".")[2])}


def _unequal(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {key: (first.get(key, _MISSING), second.get(key, _MISSING)) for key in dict.fromkeys((*first, *second))}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and not _differ_in_depth(*pair)}


def _differ_in_depth(first: Any, second: Any) -> bool:
    """Return whether two settings are lists of different length, with one entry per layer."""
    return isinstance(first, list) and isinstance(second, list) and len(first) != len(second)


def _with_effect(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if _WITHOUT_EFFECT.fullmatch(key):
            continue
        if isinstance(value, Mapping):
            yield from _with_effect(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _as_read_by_transformers(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return all settings that transformers' class of the model has; None if there is no such class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = with_floats(config)
    kind = settings.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        return None
    try:
        complete = CONFIG_MAPPING[kind](**settings).to_dict()
        known = CONFIG_MAPPING[kind]().to_dict()
    except Exception:  # configuration classes check their values in many ways; loading the model reports it
        return None
    return {key: value for key, value in complete.items() if key in known}
