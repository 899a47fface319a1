"""A plugin that lets a dense family become a mixture class that is not built in: ERNIE 4.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertctl import Architecture, MixtureTarget, hookimpl
from expertctl.core.hooks.mixtures import MixtureShape


def config(dense: Mapping[str, Any], shape: MixtureShape) -> dict[str, Any]:
    return {
        **dense,
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "moe_num_experts": shape.num_experts,
        "moe_k": shape.top_k,
        "moe_intermediate_size": dense["intermediate_size"],
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
    }


ERNIE_MOE = MixtureTarget(
    name="ernie4_5_moe",
    model_class="Ernie4_5_MoeForCausalLM",
    config=config,
    expert=lambda name, number: name.replace("mlp.", f"mlp.experts.{number}."),
    router="mlp.gate.weight",
    refusal=lambda dense, shape: None if shape.normalized else "its gates always sum to one",
    zeros=lambda mixture: {"mlp.moe_statics.e_score_correction_bias": (1, mixture["moe_num_experts"])},
)


@hookimpl
def architectures() -> list[Architecture]:
    return [
        Architecture(
            name="ernie4_5",
            model_types=("ernie4_5",),
            feed_forward=("model.layers.*.mlp.*",),
            attention=("model.layers.*.self_attn.*",),
            norms=("model.layers.*norm.weight", "model.norm.weight"),
            embeddings=("model.embed_tokens.weight", "lm_head.weight"),
            mixtures=(ERNIE_MOE,),
        )
    ]
