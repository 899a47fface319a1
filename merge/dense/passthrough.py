"""Passthrough: one model's tensor as it is, for stacking layers, or scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.types import TensorGroup


@dataclass(frozen=True)
class PassthroughOptions:
    """What to do to it."""

    scale: float = 1.0
    """What every element is multiplied by."""


def passthrough(group: TensorGroup, options: PassthroughOptions) -> Any:
    """Return the one expert's tensor, times `scale`."""
    return group.experts[0] if options.scale == 1 else group.experts[0] * options.scale
