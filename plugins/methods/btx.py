"""Branch-Train-MiX (arXiv:2403.07816): merge fully trained experts into one mixture.

Feed-forward networks become experts, all other tensors are averaged, and the router is initialised randomly.
The mixture is then fine-tuned on all domains (`expertctl tune --trains mixture`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.merging import MergeMethod
from ...merge.mixture.options import MixtureOptions
from .mixtures import mixture_method


@dataclass(frozen=True)
class BtxOptions(MixtureOptions):
    """Mixture options with averaged shared tensors and a random router."""

    shared: Literal["seed", "average"] = "average"
    router: str = "random"


@hookimpl
def merge_methods() -> list[MergeMethod]:
    summary = "mixture of experts: the experts' feed-forward networks, all other tensors averaged"
    return [mixture_method("btx", summary, BtxOptions)]
