"""The configuration of a stitched model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from ..sources.shared_settings import SHARED_SETTINGS

MODEL_TYPE = "expertctl_stitched"


class StitchedConfig(PretrainedConfig):
    """Which models are stitched together, and where."""

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
        self.members = [dict(one) for one in members]
        """Hub first: `name`, `folder` (relative to this one), `digest`, `width`, `num_layers` of each."""
        self.num_stitches = num_stitches
        self.projected = projected
        """Experts go on with what the hub took from them (the paper's equations), not with their own states (its prose)."""
        self.dropout = dropout
        for name in SHARED_SETTINGS:
            if name in self.hub:
                kwargs.setdefault(name, self.hub[name])
        super().__init__(**kwargs)

    @property
    def expert_widths(self) -> dict[str, int]:
        return {one["name"]: int(one["width"]) for one in self.members[1:]}
