"""Where the parts of a model family are: as a plugin describes the family, else by the usual tensor names."""

from __future__ import annotations

from .manager import PluginManager, installed_plugins
from .mixtures import Architecture


def architecture_of(model_type: str, plugins: PluginManager | None = None) -> Architecture:
    """Return the family of a `config.json` model type; a family that no plugin describes gets the usual names."""
    offers = (plugins or installed_plugins()).offers(Architecture)
    families = {kind: family for family in offers.values() for kind in family.model_types}
    return families.get(model_type) or usual_architecture(model_type)


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
