"""The model families that GGUF and llama.cpp know, and what their implementation there cannot express.

llama.cpp computes each architecture by code of its own, in which much is fixed that transformers reads from the
configuration. A model whose configuration says otherwise would be another model there, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ....core.errors import UserError
from ....core.hooks.evaluation import ExportInputs
from ....core.models.loading import read_config


@dataclass(frozen=True)
class Family:
    """A family of transformers as an architecture of GGUF."""

    architecture: str
    """Name of the architecture in `gguf.MODEL_ARCH`."""
    pairs_rotated: bool = False
    """Whether llama.cpp rotates neighbouring elements of queries and keys (RoPE as in the paper) and not the two halves, as
    transformers does, so that their rows are reordered."""
    repeats_tied_head: bool = False
    """Whether llama.cpp requires an output tensor if it is tied to the embedding; then it is written twice."""
    refusal: Callable[[Any], str | None] = lambda config: None
    """Returns why a configuration of transformers cannot be expressed; None if it can."""


def _attention_bias(config: Any) -> str | None:
    return "its attention has biases (attention_bias)" if getattr(config, "attention_bias", False) else None


def _llama(config: Any) -> str | None:
    return "its feed-forward networks have biases (mlp_bias)" if getattr(config, "mlp_bias", False) else None


def _gates(config: Any, *, normalized: bool) -> str | None:
    """Return why the gates of a mixture differ from llama.cpp's; of all experts, they sum to 1 in any case."""
    is_normalized = bool(getattr(config, "norm_topk_prob", False))
    if config.num_experts_per_tok < config.num_experts and is_normalized != normalized:
        return f"llama.cpp's gates of this family {'always' if normalized else 'never'} sum to 1 (norm_topk_prob)"
    if getattr(config, "decoder_sparse_step", 1) != 1 or getattr(config, "mlp_only_layers", None):
        return "some of its layers have no experts (decoder_sparse_step, mlp_only_layers)"
    return None


def _qwen2_moe(config: Any) -> str | None:
    if not getattr(config, "qkv_bias", True):
        return "its attention has no biases, which llama.cpp requires of this family (qkv_bias)"
    return _gates(config, normalized=False)


def _olmoe(config: Any) -> str | None:
    if getattr(config, "clip_qkv", None) is not None:
        return "it clips queries, keys and values (clip_qkv)"
    return _attention_bias(config) or _gates(config, normalized=False)


FAMILIES = {
    "llama": Family("LLAMA", pairs_rotated=True, refusal=_llama),
    "mistral": Family("LLAMA", pairs_rotated=True),
    "mixtral": Family("LLAMA", pairs_rotated=True),
    "qwen2": Family("QWEN2"),
    "qwen2_moe": Family("QWEN2MOE", repeats_tied_head=True, refusal=_qwen2_moe),
    "qwen3": Family("QWEN3", refusal=_attention_bias),
    "qwen3_moe": Family(
        "QWEN3MOE",
        repeats_tied_head=True,
        refusal=lambda config: _attention_bias(config) or _gates(config, normalized=True),
    ),
    "olmo2": Family("OLMO2", repeats_tied_head=True, refusal=_attention_bias),
    "olmoe": Family("OLMOE", repeats_tied_head=True, refusal=_olmoe),
}
"""Model types of transformers that can be exported."""


def family_of(model: ExportInputs) -> Family:
    """Return the family of a model; raises `UserError` if llama.cpp has none for it, or another model under its name."""
    config = read_config(model.files)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"'{model.name}' is of family '{config.model_type}', which exporter 'gguf' does not map; it maps "
            f"{', '.join(sorted(FAMILIES))}; --to safetensors takes any family"
        )
    if reason := _shared_refusal(config) or family.refusal(config):
        raise UserError(f"'{model.name}' cannot be expressed in GGUF as '{config.model_type}': {reason}")
    return family


def _shared_refusal(config: Any) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    kind, supported = rope.get("rope_type", "default"), ("default", "linear", "llama3")
    if kind not in supported or not isinstance(rope.get("rope_theta"), int | float):
        return f"its RoPE is of type '{kind}'; supported: {', '.join(supported)} with one base for all layers"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "its RoPE rotates only a part of each head (partial_rotary_factor)"
    if config.hidden_act != "silu":
        return f"its activation is '{config.hidden_act}', and llama.cpp's is 'silu'"
    return None
