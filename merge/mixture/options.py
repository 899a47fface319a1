"""Options of merge methods that build a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...core.hooks.mixtures import MixtureShape
from ...core.hooks.option_checks import check_top_k


@dataclass(frozen=True)
class MixtureOptions:
    """Options of a mixture of experts."""

    top_k: int | None = None
    """Number of experts per token. Not set: 2, or all if there are fewer."""
    normalized: bool = True
    """Normalize the top-k gates to sum to 1, so that copies of the seed give the seed (`norm_topk_prob`)."""
    router: str = "hidden"
    """Initialisation of the router: a name that `expertctl plugins` lists under router starts."""
    router_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the router initialisation, such as `{seed: 1}`."""
    shared: Literal["seed", "average"] = "seed"
    """Source of all tensors outside the feed-forward networks: the seed, from which experts must not differ
    there, or the weighted mean of the experts."""
    with_seed: bool = False
    """Include the seed's feed-forward network as the first expert."""
    discard: bool = False
    """With `shared: seed`, drop changes of experts outside the FFNs instead of refusing them."""
    bias: Literal["auto", "fold", "drop", "carry"] = "auto"
    """Treatment of the router's biases: `fold` them into its rows, `drop` them (as the authors of FlexOlmo
    do), or `carry` them, which requires the container. `auto` folds them if the router initialisation
    supports it, else drops them."""
    target: str = "auto"
    """Model class: `auto` (the family's), a name such as `mixtral`, or `container`."""
    layout: Literal["per_expert", "fused"] = "per_expert"
    """Expert tensors stored separately, as in published checkpoints, or fused, as transformers loads them."""
    usual_top_k: ClassVar[int] = 2
    """Default of `top_k`."""


def shape_of(options: MixtureOptions, num_experts: int) -> MixtureShape:
    """Return the shape of a mixture of `num_experts` experts; raises `UserError` for an invalid top-k."""
    top_k = options.top_k if options.top_k is not None else min(options.usual_top_k, num_experts)
    check_top_k(top_k, num_experts)
    return MixtureShape(num_experts, top_k, options.normalized, options.bias == "carry")
