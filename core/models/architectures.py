"""Tensor names of a model family: those that a plugin describes, otherwise the usual ones."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from ..hooks.manager import installed_plugins
from ..hooks.mixtures import Architecture

_BLOCKS = ("mlp", "ffn", "feed_forward", "block_sparse_moe", "shared_mlp", "mlp_block")
_FEED_FORWARD = (
    tuple(f"*.{stack}.*.{block}.*" for stack in ("layers", "h", "blocks") for block in _BLOCKS),
    ("*.layers.*.fc1.*", "*.layers.*.fc2.*"),
    tuple(f"*.layers.*.mixer.{part}*" for part in ("up_proj", "down_proj", "experts", "shared_experts", "gate")),
)
"""Names of feed-forward tensors in the families of transformers; the first group with a match counts."""


def architecture_of(model_type: str, names: Iterable[str] = ()) -> Architecture:
    """Return the family of a `config.json` model type, with the usual tensor names if no plugin describes it.

    `names` are tensors of the model, by which the usual patterns for feed-forward networks are chosen.
    """
    offers = installed_plugins().offers(Architecture)
    families = {kind: family for family in offers.values() for kind in family.model_types}
    tensors = tuple(names)
    groups = (
        tuple(pattern for pattern in group if any(fnmatchcase(name, pattern) for name in tensors))
        for group in _FEED_FORWARD
    )
    present = next((group for group in groups if group), _FEED_FORWARD[0])
    return families.get(model_type) or Architecture(
        name=model_type,
        model_types=(model_type,),
        feed_forward=present,
        attention=("*.layers.*.*attn.*", "*.layers.*.attention.*", "*.h.*.attn.*", "*.h.*.self_attention.*"),
        norms=("*norm*", "*.ln_*"),
        embeddings=("*embed*", "*.wte.*", "*.wpe.*", "lm_head.*"),
    )
