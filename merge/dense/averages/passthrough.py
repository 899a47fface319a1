"""Passthrough: copy a tensor of one model, optionally scaled; used to stack layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import PerExpert, TensorGroup
from ..arrays import per_expert_values


@dataclass(frozen=True)
class PassthroughOptions:
    """Options of passthrough."""

    scale: PerExpert = 1.0
    """Factor applied to every element."""


def passthrough(group: TensorGroup, options: PassthroughOptions) -> Any:
    """Return the tensor of the single expert times `scale`."""
    (scale,) = per_expert_values(options.scale, group)
    return group.experts[0] if scale == 1 else group.experts[0] * scale
