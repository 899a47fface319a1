"""Passthrough: one model's tensor as it is, for stacking layers, or scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import PerExpert, TensorGroup
from ..arrays import each


@dataclass(frozen=True)
class PassthroughOptions:
    """What to do to it."""

    scale: PerExpert = 1.0
    """What every element is multiplied by."""


def passthrough(group: TensorGroup, options: PassthroughOptions) -> Any:
    """Return the one expert's tensor, times `scale`."""
    (scale,) = each(options.scale, group)
    return group.experts[0] if scale == 1 else group.experts[0] * scale
