"""Trimmed mean: for each element, drop the lowest and highest values and average the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertctl import TensorGroup, TensorMerge, UserError, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Options:
    """Options of the trimmed mean."""

    trim: int = 1
    """Experts dropped at either end."""


def trimmed_mean(group: TensorGroup, options: Options) -> Tensor:
    """Return the element-wise mean of the experts' middle values."""
    import torch  # here and not at the top, so that `expertctl --help` stays fast

    count = len(group.experts)
    if options.trim < 0 or 2 * options.trim >= count:
        raise UserError(f"trim {options.trim} leaves nothing of {count} experts; it is 0 to {(count - 1) // 2}")
    ordered = torch.stack(group.experts).sort(dim=0).values
    return ordered[options.trim : count - options.trim].mean(dim=0)


@hookimpl
def merge_methods() -> list[TensorMerge]:
    """Offer the method to `expertctl merge`."""
    summary = "the mean without the lowest and highest experts of every element"
    return [TensorMerge("trimmed_mean", summary, merge=trimmed_mean, options=Options)]
