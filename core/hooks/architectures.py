"""Tensor names of a model family: those that a plugin describes, otherwise the usual ones."""

from __future__ import annotations

from .manager import installed_plugins
from .mixtures import Architecture


def architecture_of(model_type: str) -> Architecture:
    """Return the family of a `config.json` model type, with the usual tensor names if no plugin describes it."""
    offers = installed_plugins().offers(Architecture)
    families = {kind: family for family in offers.values() for kind in family.model_types}
    return families.get(model_type) or Architecture(
        name=model_type,
        model_types=(model_type,),
        feed_forward=("*.layers.*.mlp.*", "*.h.*.mlp.*"),
        attention=("*.layers.*.*attn.*", "*.layers.*.attention.*", "*.h.*.attn.*", "*.h.*.self_attention.*"),
        norms=("*norm*", "*.ln_*"),
        embeddings=("*embed*", "*.wte.*", "*.wpe.*", "lm_head.*"),
    )
