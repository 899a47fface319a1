"""What can be chosen about a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ...core.errors import UserError
from ...core.hooks.mixtures import MixtureShape


@dataclass(frozen=True)
class MixtureOptions:
    """How experts become one model."""

    top_k: int | None = None
    """Experts that each token passes through. Not set: 2, or all where there are fewer."""
    normalized: bool = True
    """Let the gates of those experts sum to one, so that copies of the seed give the seed (`norm_topk_prob`)."""
    router: str = "hidden"
    """How the router starts: a name that `expertctl plugins` lists under routers."""
    router_options: Mapping[str, Any] = field(default_factory=dict)
    """What the router's start is told: `{seed: 1}`."""
    shared: Literal["seed", "average"] = "seed"
    """Where everything but the feed-forwards comes from: the seed, which experts must not have changed, or the
    weighted mean of the experts."""
    with_seed: bool = False
    """Take the seed's feed-forward as an expert too, the first."""
    discard: bool = False
    """Drop what experts changed outside of their feed-forwards, where `shared` is the seed."""
    bias: Literal["auto", "fold", "drop", "carry"] = "auto"
    """The router's biases: folded into its rows, dropped (as FlexOlmo's authors do), or carried, which only the container
    can. `auto` folds them where the start of the router says how, else drops them."""
    target: str = "auto"
    """Model class: `auto` (the family's), its name (`mixtral`), or `container`."""
    layout: Literal["per_expert", "fused"] = "per_expert"
    """Expert tensors one by one, as checkpoints of these classes are published, or fused as transformers holds them."""
    usual_top_k: ClassVar[int] = 2


def shape_of(options: MixtureOptions, num_experts: int) -> MixtureShape:
    """Return what the mixture will be like; raises `UserError` for a top-k that is not possible."""
    top_k = options.top_k if options.top_k is not None else min(options.usual_top_k, num_experts)
    if not 1 <= top_k <= num_experts:
        raise UserError(f"top_k is {top_k}; with {num_experts} experts it is 1 to {num_experts}")
    return MixtureShape(num_experts, top_k, options.normalized, options.bias == "carry")
