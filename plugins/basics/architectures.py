"""Tensor name patterns of the built-in model families, and the mixtures that they can be merged into."""

from __future__ import annotations

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.mixtures import Architecture, MixtureTarget
from ...merge.mixture.targets import FLEXOLMO, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE

_FEED_FORWARD = ("model.layers.*.mlp.*",)
_ATTENTION = ("model.layers.*.self_attn.*",)
_NORMS = ("model.layers.*norm.weight", "model.norm.weight")
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def _family(name: str, model_types: tuple[str, ...], *mixtures: MixtureTarget) -> Architecture:
    """Return the architecture of a family with Llama's tensor names."""
    return Architecture(name, model_types, _FEED_FORWARD, _ATTENTION, _NORMS, _EMBEDDINGS, mixtures)


@hookimpl
def architectures() -> list[Architecture]:
    return [
        _family("llama", ("llama",), MIXTRAL, QWEN2_MOE),
        _family("mistral", ("mistral",), MIXTRAL, QWEN2_MOE),
        Architecture("olmo", ("olmo",), _FEED_FORWARD, _ATTENTION, (), _EMBEDDINGS, (OLMOE,)),
        _family("olmo2", ("olmo2",), FLEXOLMO),
        _family("qwen2", ("qwen2",), QWEN2_MOE),
        _family("qwen3", ("qwen3",), QWEN3_MOE),
        _family("gemma", ("gemma", "gemma2", "gemma3_text")),
        Architecture(
            name="gpt2",
            model_types=("gpt2",),
            feed_forward=("transformer.h.*.mlp.*",),
            attention=("transformer.h.*.attn.*",),
            norms=("transformer.h.*.ln_*", "transformer.ln_f.*"),
            embeddings=("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"),
        ),
    ]
