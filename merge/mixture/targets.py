"""The model classes that dense families turn into as mixtures, and which models each of them can express.

Configurations are copied from the dense model's: class defaults of the two differ (eps, rope, sliding window).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...core.errors import UserError
from ...core.hooks.mixtures import Architecture, MixtureShape, MixtureTarget

CONTAINER = "container"
CONTAINER_TYPE = "expertctl_mixture"
_GATED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
_NOT_COPIED = ("architectures", "model_type", "auto_map", "_name_or_path", "transformers_version")
_QWEN2_SHARED_WIDTH = 64
"""Width of the shared expert that Qwen2-MoE must have and that is zero here; small, and divisible among GPUs."""


def _copied(dense: Mapping[str, Any], model_type: str, model_class: str, **changes: Any) -> dict[str, Any]:
    kept = {key: value for key, value in dense.items() if key not in _NOT_COPIED}
    return {"architectures": [model_class], "model_type": model_type, **kept, **changes}


def _named(module: str, renamed: Mapping[str, str]) -> Callable[[str, int], str]:
    """Return what finds `mlp.up_proj.weight` of expert 3 as `MODULE.experts.3.up_proj.weight`."""

    def name(dense: str, expert: int) -> str:
        inner = dense.removeprefix("mlp.").removesuffix(".weight")
        return f"{module}.experts.{expert}.{renamed.get(inner, inner)}.weight"

    return name


def _plain_feed_forward(dense: Mapping[str, Any]) -> str | None:
    """Return the rule that a gated feed-forward without biases breaks, or None."""
    if dense.get("mlp_bias"):
        return "its experts have no biases, and the model's feed-forwards do (mlp_bias)"
    return None


def _mixtral_config(dense: Mapping[str, Any], shape: MixtureShape) -> dict[str, Any]:
    window = dense.get("sliding_window") if dense.get("model_type") == "mistral" else None
    # attention and feed-forward biases are Llama's settings; Mixtral has neither
    kept = {
        key: value
        for key, value in dense.items()
        if key not in ("attention_bias", "mlp_bias", "pretraining_tp")
    }
    return _copied(
        kept,
        "mixtral",
        "MixtralForCausalLM",
        sliding_window=window,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        output_router_logits=False,
        router_jitter_noise=0.0,
    )


def _mixtral_refusal(dense: Mapping[str, Any], shape: MixtureShape) -> str | None:
    if dense.get("attention_bias"):
        return "its attention has no biases, and the model's has (attention_bias)"
    if not shape.normalized and shape.top_k < shape.num_experts:
        return "its gates always sum to one (norm_topk_prob: false is not possible)"
    if shape.router_bias:
        return "its router has no biases"
    return _plain_feed_forward(dense)


def _flexolmo_config(dense: Mapping[str, Any], shape: MixtureShape) -> dict[str, Any]:
    return _copied(
        dense,
        "flex_olmo",
        "FlexOlmoForCausalLM",
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=shape.normalized,
        output_router_logits=False,
    )


def _no_router_bias(dense: Mapping[str, Any], shape: MixtureShape) -> str | None:
    return "its router has no biases" if shape.router_bias else _plain_feed_forward(dense)


def _qwen3_config(dense: Mapping[str, Any], shape: MixtureShape) -> dict[str, Any]:
    kept = {key: value for key, value in dense.items() if key not in ("layer_types", "max_window_layers")}
    return _copied(
        kept,
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        moe_intermediate_size=dense["intermediate_size"],
        decoder_sparse_step=1,
        mlp_only_layers=[],
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=shape.normalized,
        output_router_logits=False,
    )


def _qwen3_refusal(dense: Mapping[str, Any], shape: MixtureShape) -> str | None:
    if dense.get("use_sliding_window"):
        return "its sliding window covers all layers or none, and the model's only some (use_sliding_window)"
    return _no_router_bias(dense, shape)


def _qwen2_config(dense: Mapping[str, Any], shape: MixtureShape) -> dict[str, Any]:
    return _copied(
        dense,
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        moe_intermediate_size=dense["intermediate_size"],
        shared_expert_intermediate_size=_QWEN2_SHARED_WIDTH,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        qkv_bias=True,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=shape.normalized,
        output_router_logits=False,
    )


def _qwen2_zeros(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], config["shared_expert_intermediate_size"]
    return {
        "mlp.shared_expert.gate_proj.weight": (inner, width),
        "mlp.shared_expert.up_proj.weight": (inner, width),
        "mlp.shared_expert.down_proj.weight": (width, inner),
        "mlp.shared_expert_gate.weight": (1, width),
    }


def _olmoe_refusal(dense: Mapping[str, Any], shape: MixtureShape) -> str | None:
    return "its norms are RMS norms with weights and it normalises queries and keys, and OLMo's norms subtract the mean and have no weights"


MIXTRAL = MixtureTarget(
    "mixtral",
    "MixtralForCausalLM",
    _mixtral_config,
    _named("block_sparse_moe", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}),
    "block_sparse_moe.gate.weight",
    _mixtral_refusal,
)
FLEXOLMO = MixtureTarget(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    _flexolmo_config,
    _named("mlp", {}),
    "mlp.gate.weight",
    _no_router_bias,
)
QWEN3_MOE = MixtureTarget(
    "qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_config, _named("mlp", {}), "mlp.gate.weight", _qwen3_refusal
)
QWEN2_MOE = MixtureTarget(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _qwen2_config,
    _named("mlp", {}),
    "mlp.gate.weight",
    _no_router_bias,
    zeros=_qwen2_zeros,
)
OLMOE = MixtureTarget(
    "olmoe", "OlmoeForCausalLM", _flexolmo_config, _named("mlp", {}), "mlp.gate.weight", _olmoe_refusal
)


def container_target(family: Architecture) -> MixtureTarget:
    """Return our own container as a target: it takes the feed-forwards of any family."""
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
    """Return what a family calls the feed-forward within a layer; raises `UserError` where it is no one module."""
    found = {pattern.rsplit(".*.", 1)[-1].removesuffix(".*") for pattern in family.feed_forward}
    if len(found) != 1 or any("*" in name for name in found):
        raise UserError(
            f"the feed-forwards of family '{family.name}' are no single module in each layer "
            f"({', '.join(family.feed_forward)}); mixtures need one"
        )
    return found.pop()


def choose_target(
    family: Architecture, dense: Mapping[str, Any], shape: MixtureShape, wanted: str = "auto"
) -> MixtureTarget:
    """Return the model class that a mixture is written as: the family's first that fits, or the one that is asked for.

    Raises `UserError` that names, for the one asked for, the rule that the model breaks, and the nearest that fits.
    """
    there = {target.name: target for target in (*family.mixtures, container_target(family))}
    refusals = {name: target.refusal(dense, shape) for name, target in there.items()}
    fitting = [name for name, reason in refusals.items() if reason is None]
    if wanted == "auto":
        return there[fitting[0]]
    if wanted not in there:
        raise UserError(
            f"a mixture of '{family.name}' models cannot be written as '{wanted}'; it can as {_listed(fitting)}"
        )
    if refusals[wanted] is not None:
        raise UserError(
            f"the mixture cannot be written as '{wanted}' ({there[wanted].model_class}): {refusals[wanted]}; "
            f"it can as {_listed(fitting)}"
        )
    return there[wanted]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
