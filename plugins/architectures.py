"""Where the built-in model families keep their parts."""

from __future__ import annotations

from ..core.hookspecs import hookimpl
from ..core.types import Architecture

_FEED_FORWARD = ("model.layers.*.mlp.*",)
_ATTENTION = ("model.layers.*.self_attn.*",)
_NORMS = ("model.layers.*norm.weight", "model.norm.weight")
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def _family(name: str, model_types: tuple[str, ...], mixture_class: str | None) -> Architecture:
    """Describe a family that names its parts as Llama does."""
    return Architecture(name, model_types, _FEED_FORWARD, _ATTENTION, _NORMS, _EMBEDDINGS, mixture_class)


@hookimpl
def architectures() -> list[Architecture]:
    return [
        _family("llama", ("llama",), "MixtralForCausalLM"),
        _family("mistral", ("mistral",), "MixtralForCausalLM"),
        _family("olmo2", ("olmo2",), "FlexOlmoForCausalLM"),
        _family("qwen2", ("qwen2",), "Qwen2MoeForCausalLM"),
        _family("qwen3", ("qwen3",), "Qwen3MoeForCausalLM"),
        _family("gemma", ("gemma", "gemma2", "gemma3_text"), None),
        Architecture(
            name="gpt2",
            model_types=("gpt2",),
            feed_forward=("transformer.h.*.mlp.*",),
            attention=("transformer.h.*.attn.*",),
            norms=("transformer.h.*.ln_*", "transformer.ln_f.*"),
            embeddings=("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"),
        ),
    ]
