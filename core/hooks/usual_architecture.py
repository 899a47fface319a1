"""Where a model keeps its parts whose family no plugin describes: where most families do."""

from __future__ import annotations

from .mixtures import Architecture


def usual_architecture(model_type: str) -> Architecture:
    """Return a family of one model type, with the names that nearly all decoders of today use.

    Whoever looks for parts says so where there are none by these names.
    """
    return Architecture(
        name=model_type,
        model_types=(model_type,),
        feed_forward=("*.layers.*.mlp.*", "*.h.*.mlp.*"),
        attention=("*.layers.*.*attn.*", "*.layers.*.attention.*", "*.h.*.attn.*", "*.h.*.self_attention.*"),
        norms=("*norm*", "*.ln_*"),
        embeddings=("*embed*", "*.wte.*", "*.wpe.*", "lm_head.*"),
    )
