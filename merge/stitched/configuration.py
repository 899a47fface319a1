"""Configuration of a stitched model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

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
    def expert_widths(self) -> dict[str, int]:
        return {member["name"]: int(member["width"]) for member in self.members[1:]}
