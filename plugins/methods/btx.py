"""Branch-Train-MiX (arXiv:2403.07816): whole experts become one mixture.

Their feed-forwards stand side by side, everything else is averaged, the router is new; then the mixture is trained
on all domains together (`expertctl tune --trains mixture`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.merging import MergeMethod
from ...merge.mixture.mixing import plan_mixture
from ...merge.mixture.options import MixtureOptions
from ...merge.mixture.routing.switching import without_experts


@dataclass(frozen=True)
class BtxOptions(MixtureOptions):
    """A mixture whose shared part is the experts' mean."""

    shared: Literal["seed", "average"] = "average"
    router: str = "random"


@hookimpl
def merge_methods() -> list[MergeMethod]:
    return [
        MergeMethod(
            name="btx",
            summary="one mixture of experts: the experts' feed-forwards on their averaged attention",
            assemble=plan_mixture,
            kind="moe",
            switch_off=without_experts,
            options=BtxOptions,
        )
    ]
