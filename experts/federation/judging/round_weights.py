"""Acceptance checks of the weights that an owner delivers into a round of a shared model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ....core.artefacts.digests import digest_of_tensors
from ....core.artefacts.numeric import FLOATING
from ....core.artefacts.safetensors_io import Checkpoint, digest_start, tensor_bytes
from ....core.errors import UserError, first_line
from ....core.hooks.option_checks import check_at_least, check_positive, check_range
from .delivered_tensors import refusal_of_entry, upcast
from .refusal import Refusal, RefusalCode


@dataclass(frozen=True)
class AveragingRules:
    """Bounds on an owner's weights, and settings of the outer optimiser that differ from the recipe's."""

    max_change: float = 1.0
    """Largest change in a round: norm of the difference over all tensors, divided by the norm of the shared weights."""
    max_weight: float = 10.0
    """Cap on an owner's token count, as a multiple of the round's median, since token counts are declared by owners."""
    learning_rate: float | None = None
    """Learning rate of the outer optimiser; None: the recipe's."""
    momentum: float | None = None
    """Nesterov momentum of the outer optimiser, 0 for none; None: the recipe's."""
    late_discount: float = 0.5
    """Factor on an owner's share for each round that its delivery is late, from 0 to 1."""

    def __post_init__(self) -> None:
        check_positive("max_change", self.max_change)
        check_at_least("max_weight", self.max_weight, 1)
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be at least 0 and less than 1")
        check_range("late_discount", self.late_discount, 0, 1)


@dataclass(frozen=True)
class Delivery:
    """Accepted weights of one owner."""

    digest: str
    weight: float
    """Token count of the owner's text."""
    change: float
    """Relative change, as in `AveragingRules.max_change`."""
    at: str = ""
    """Time of the delivery, ISO 8601."""
    late: int = 0
    """Rounds between the one that the weights start from and the one that they count in."""


def examine_delivery(file: Path, weight: float, shared: Checkpoint, rules: AveragingRules) -> Delivery | Refusal:
    """Check an owner's token count, and its weights against the shared weights.

    The weights must agree in names, shapes and dtypes, and be finite and within the relative change.
    """
    import torch

    if not 0 < weight < math.inf:  # false for NaN as well
        return Refusal(RefusalCode.MANIFEST, f"{weight:g} tokens")
    try:
        weights = Checkpoint([file])
        for name in [*shared, *weights]:
            if name not in weights or name not in shared:
                holder = "the owner's weights lack" if name not in weights else "the shared model has no"
                return Refusal(RefusalCode.SHAPES, f"{holder} '{name:.100}'")
            refusal = refusal_of_entry(weights.entry(name), shared.entry(name), "the shared tensor")
            if refusal is not None:
                return refusal
        digests: dict[str, str] = {}
        squared_change = squared_norm = 0.0
        for name in shared:
            dtype = shared.entry(name).dtype
            digest = digest_start(dtype, shared.entry(name).shape)
            for begin, end in shared.spans(name):
                piece, shared_piece = weights.span(name, begin, end), shared.span(name, begin, end)
                digest.update(tensor_bytes(piece))
                if dtype not in FLOATING:
                    if not torch.equal(piece, shared_piece):
                        return Refusal(RefusalCode.FROZEN, f"'{name}' is not a floating-point tensor")
                    continue
                before, after = upcast(shared_piece), upcast(piece)
                if not bool(torch.isfinite(after).all()):
                    return Refusal(RefusalCode.NOT_FINITE, f"'{name}'")
                squared_change += float((after - before).square().sum(dtype=torch.float64))
                squared_norm += float(before.square().sum(dtype=torch.float64))
            digests[name] = digest.hexdigest()
    except UserError as error:
        return Refusal(RefusalCode.FILES, first_line(error).replace(str(file), "the file"))
    change = math.sqrt(squared_change / (squared_norm or 1.0))
    if not change <= rules.max_change:
        return Refusal(
            RefusalCode.NORM, f"by {change:.3g} times the norm of the shared weights; {rules.max_change:g} is allowed"
        )
    return Delivery(digest_of_tensors(digests), float(weight), change)
