"""Configuration of a stitched model. Stitches are evenly spaced in the hub, and at equal relative depth in experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from ...core.errors import UserError
from ..sources.shared_settings import SHARED_SETTINGS

MODEL_TYPE = "expertctl_stitched"


class StitchedConfig(PretrainedConfig):
    """Hub, members and stitch layers of a stitched model."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        hub: Mapping[str, Any] | None = None,
        members: Sequence[Mapping[str, Any]] = (),
        num_stitches: int = 1,
        projected: bool = False,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.hub = dict(hub or {})
        """The hub's `config.json`."""
        self.members = [dict(member) for member in members]
        """`name`, `folder` (relative), `digest`, `width` and `num_layers` of each member, hub first."""
        self.num_stitches = num_stitches
        self.projected = projected
        """Experts continue from projected states (the paper's equations), not their own (its text)."""
        self.dropout = dropout
        for name in SHARED_SETTINGS:
            if name in self.hub:
                kwargs.setdefault(name, self.hub[name])
        super().__init__(**kwargs)

    @property
    def member_names(self) -> tuple[str, ...]:
        """Names of the hub and the experts."""
        return tuple(member["name"] for member in self.members)

    @property
    def expert_widths(self) -> dict[str, int]:
        return {member["name"]: int(member["width"]) for member in self.members[1:]}


def hub_points(num_layers: int, num_stitches: int) -> tuple[int, ...]:
    """Return the hub depth of each stitch (arXiv:2502.00075, section 3); raises `UserError` for a wrong number."""
    if not 1 <= num_stitches <= num_layers:
        raise UserError(
            f"num_stitches is {num_stitches}, and the hub has {num_layers} layers; it must be in the range "
            f"1 to {num_layers}"
        )
    interval = num_layers // num_stitches
    return (*(interval * number for number in range(1, num_stitches)), num_layers)


def matched_points(points: tuple[int, ...], name: str, num_layers: int) -> tuple[int, ...]:
    """Return the number of expert layers before each stitch: the hub's relative depths, rounded to layers.

    `points` are the hub's; the last one is its depth. Raises `UserError` for an expert that is too shallow.
    """
    depth = points[-1]
    matched = tuple(round(point * num_layers / depth) for point in points)
    if any(second <= first for first, second in zip((0, *matched), matched, strict=False)):
        raise UserError(
            f"expert '{name}' has {num_layers} layers, too few for {len(points)} stitches at the relative depths of "
            f"the hub ({', '.join(map(str, points))} of {depth}); use fewer with --option num_stitches"
        )
    return matched


def leads_into_hub(number: int, num_stitches: int) -> bool:
    """Return whether a stitch leads from experts into the hub: the last one does, the others alternate."""
    return (num_stitches - 1 - number) % 2 == 0
