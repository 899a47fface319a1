"""Mixture classes of transformers for dense model families, and the constraints of each class.

Configurations are copied from the dense model's, since the class defaults differ (eps, rope, sliding window).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.hooks.mixtures import Architecture, MixtureShape, MixtureTarget
from ..sources.tensor_names import layer_names

CONTAINER = "container"
CONTAINER_TYPE = "expertctl_mixture"
_NOT_COPIED = ("architectures", "model_type", "auto_map", "_name_or_path", "transformers_version")
_WITHOUT_BIASES = ("llama", "mistral")
"""Families whose attention has no biases, beside that of Qwen2-MoE, which has."""
_QWEN2_SHARED_WIDTH = 64
"""Hidden size of the all-zero shared expert that Qwen2-MoE requires; small, and divisible among GPUs."""


def _config(
    model_type: str, model_class: str, dense: Mapping[str, Any], removed: Sequence[str] = (), **settings: Any
) -> dict[str, Any]:
    """Return a dense model's configuration as that of a mixture class, with further settings."""
    kept = {key: value for key, value in dense.items() if key not in (*_NOT_COPIED, *removed)}
    return {"architectures": [model_class], "model_type": model_type, **kept, **settings}


def _naming(module: str, renamed: Mapping[str, str]) -> Callable[[str, int], str]:
    """Return a function that maps `mlp.up_proj.weight` of expert 3 to `MODULE.experts.3.up_proj.weight`."""

    def name(dense: str, expert: int) -> str:
        inner = dense.removeprefix("mlp.").removesuffix(".weight")
        return f"{module}.experts.{expert}.{renamed.get(inner, inner)}.weight"

    return name


def _target(
    name: str,
    model_class: str,
    refusal: Callable[[Mapping[str, Any], MixtureShape], str | None],
    *,
    removed: Sequence[str] = (),
    settings: Callable[[Mapping[str, Any], MixtureShape], Mapping[str, Any]] = lambda dense, shape: {},
    **fields: Any,
) -> MixtureTarget:
    """Return a class with the usual names of settings and tensors; `removed` are settings that it does not have."""

    def config(dense: Mapping[str, Any], shape: MixtureShape) -> dict[str, Any]:
        return _config(
            name,
            model_class,
            dense,
            removed,
            **settings(dense, shape),
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=shape.normalized,
            output_router_logits=False,
        )

    return MixtureTarget(name, model_class, config, _naming("mlp", {}), "mlp.gate.weight", refusal, **fields)


def _no_router_bias(dense: Mapping[str, Any], shape: MixtureShape) -> str | None:
    if shape.router_bias:
        return "its router has no biases"
    if dense.get("mlp_bias"):
        return "its experts have no biases, and the model's feed-forward networks have (mlp_bias)"
    return None


def _mixtral_config(dense: Mapping[str, Any], shape: MixtureShape) -> dict[str, Any]:
    return _config(
        "mixtral",
        "MixtralForCausalLM",
        dense,
        ("attention_bias", "mlp_bias", "pretraining_tp"),  # settings of Llama
        sliding_window=dense.get("sliding_window") if dense.get("model_type") == "mistral" else None,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        output_router_logits=False,
        router_jitter_noise=0.0,
    )


def _mixtral_refusal(dense: Mapping[str, Any], shape: MixtureShape) -> str | None:
    if dense.get("attention_bias"):
        return "its attention has no biases, and the model's has (attention_bias)"
    if not shape.normalized and shape.top_k < shape.num_experts:
        return "its gates always sum to 1 (norm_topk_prob: false is not supported)"
    return _no_router_bias(dense, shape)


def _qwen3_refusal(dense: Mapping[str, Any], shape: MixtureShape) -> str | None:
    if dense.get("use_sliding_window"):
        return "its sliding window covers all layers or none, and the model's only some (use_sliding_window)"
    return _no_router_bias(dense, shape)


def _qwen2_refusal(dense: Mapping[str, Any], shape: MixtureShape) -> str | None:
    if dense.get("model_type") in _WITHOUT_BIASES:
        if not shape.shared_expert:
            return "for this family, it is meant for mixtures with a shared expert"
        if dense.get("attention_bias"):
            return "its attention has no bias for the output, and the model's has (attention_bias)"
    return _no_router_bias(dense, shape)


def _qwen2_settings(dense: Mapping[str, Any], shape: MixtureShape) -> dict[str, Any]:
    settings = {
        "moe_intermediate_size": dense["intermediate_size"],
        "shared_expert_intermediate_size": dense["intermediate_size"] if shape.shared_expert else _QWEN2_SHARED_WIDTH,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": dense.get("model_type") not in _WITHOUT_BIASES,
    }
    if dense.get("model_type") in _WITHOUT_BIASES:  # Llama has no window, Mistral has the same in all layers
        has_window = dense.get("model_type") == "mistral" and bool(dense.get("sliding_window"))
        layer = "sliding_attention" if has_window else "full_attention"
        settings |= {"use_sliding_window": has_window, "layer_types": [layer] * dense["num_hidden_layers"]}
    return settings


def _qwen2_zeros(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config["shared_expert_intermediate_size"]
    return {
        "mlp.shared_expert.gate_proj.weight": (inner, width),
        "mlp.shared_expert.up_proj.weight": (inner, width),
        "mlp.shared_expert.down_proj.weight": (width, inner),
        "mlp.shared_expert_gate.weight": (1, width),
    }


MIXTRAL = MixtureTarget(
    "mixtral",
    "MixtralForCausalLM",
    _mixtral_config,
    _naming("block_sparse_moe", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}),
    "block_sparse_moe.gate.weight",
    _mixtral_refusal,
)
FLEXOLMO = _target("flex_olmo", "FlexOlmoForCausalLM", _no_router_bias)
QWEN3_MOE = _target(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _qwen3_refusal,
    removed=("layer_types", "max_window_layers"),
    settings=lambda dense, shape: {
        "moe_intermediate_size": dense["intermediate_size"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
)
QWEN2_MOE = _target(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _qwen2_refusal,
    removed=("attention_bias", "mlp_bias", "pretraining_tp"),  # settings of Llama
    settings=_qwen2_settings,
    zeros=_qwen2_zeros,
    shared_expert=lambda name: name.replace("mlp.", "mlp.shared_expert.", 1),
    shared_gate="mlp.shared_expert_gate.weight",
)
OLMOE = _target(
    "olmoe",
    "OlmoeForCausalLM",
    lambda dense, shape: (
        "it has RMS norms with weights and normalises queries and keys; OLMo's norms subtract the mean and have no weights"
    ),
)


def container_target(family: Architecture) -> MixtureTarget:
    """Return the container of expertctl as a target; it supports the feed-forward networks of any family."""
    module = feed_forward_module(family)

    def config(dense: Mapping[str, Any], shape: MixtureShape) -> dict[str, Any]:
        return {
            "architectures": ["MixtureForCausalLM"],
            "model_type": CONTAINER_TYPE,
            "member": dict(dense),
            "feed_forward": module,
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.top_k,
            "norm_topk_prob": shape.normalized,
            "router_bias": shape.router_bias,
        }

    return MixtureTarget(
        CONTAINER,
        "MixtureForCausalLM",
        config,
        lambda name, expert: f"{module}.experts.{expert}.{name.removeprefix(f'{module}.')}",
        f"{module}.router.weight",
        router_bias=f"{module}.router.bias",
        prefix="network.",
    )


def feed_forward_module(family: Architecture) -> str:
    """Return the module name of a family's FFN; raises `UserError` unless it is a single module."""
    modules = {pattern.rsplit(".*.", 1)[-1].removesuffix(".*") for pattern in family.feed_forward}
    if len(modules) != 1 or any("*" in name for name in modules):
        raise UserError(
            f"the feed-forward network of family '{family.name}' is not a single module per layer "
            f"({', '.join(family.feed_forward)}), which mixtures require"
        )
    return modules.pop()


def require_network_per_layer(
    folder: Path, family: Architecture, names: Iterable[str], feed_forward: Iterable[str], num_layers: int
) -> None:
    """Raise `UserError` unless every FFN tensor is in the family's FFN module, directly in one of the decoder layers."""
    layers, module = layer_names(names), feed_forward_module(family)
    inside = re.compile(rf"{re.escape(layers.stack)}\.\d+\.{re.escape(module)}\.")
    outside = next((name for name in feed_forward if not inside.match(name)), None)
    if outside is not None or len(layers.layers) != num_layers:
        example = f" ('{outside}')" if outside is not None else ""
        raise UserError(
            f"the feed-forward networks of {folder} ({family.name}) are not one per decoder layer{example}, which mixtures "
            "require; merge models of this family to an average or an ensemble"
        )


def _refusal(target: MixtureTarget, dense: Mapping[str, Any], shape: MixtureShape) -> str | None:
    if shape.shared_expert and target.shared_expert is None:
        return "it has no shared expert"
    return target.refusal(dense, shape)


def choose_target(
    family: Architecture, dense: Mapping[str, Any], shape: MixtureShape, wanted: str = "auto"
) -> MixtureTarget:
    """Return the `wanted` model class of a mixture, or for `auto` the family's first class that supports it.

    Raises `UserError` with the constraint that the model violates and with the classes that support it.
    """
    targets = {target.name: target for target in (*family.mixtures, container_target(family))}
    refusals = {name: _refusal(target, dense, shape) for name, target in targets.items()}
    supported = [name for name, reason in refusals.items() if reason is None]
    if wanted == "auto" and supported:
        return targets[supported[0]]
    if wanted == "auto":
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in refusals.items())
        raise UserError(f"a mixture of '{family.name}' models with these settings cannot be written ({reasons})")
    quoted = ", ".join(f"'{name}'" for name in supported)
    if wanted not in targets:
        raise UserError(f"a mixture of '{family.name}' models cannot be written as '{wanted}'; supported: {quoted}")
    if refusals[wanted] is not None:
        raise UserError(
            f"the mixture cannot be written as '{wanted}' ({targets[wanted].model_class}): {refusals[wanted]}; "
            f"supported: {quoted or 'none'}"
        )
    return targets[wanted]
