"""Options of the `local` launcher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....core.hooks.option_checks import check_at_least, check_positive


@dataclass(frozen=True)
class LocalOptions:
    """Options of the `local` launcher."""

    nproc: int = 1
    """Processes that train a run together, on a GPU each if there are GPUs."""
    strategy: Literal["ddp", "fsdp", "ep"] = "ddp"
    """How several processes hold the model: each the whole of it, each a part of every tensor, or each some experts of a
    mixture and a part of every other tensor."""
    restarts: int = 3
    """How often a run of several processes is started again from its last checkpoint after a crash."""
    minutes: float | None = None
    """Time after which a run saves its state and stops."""
    check_memory: bool = True
    """Refuse a run that needs more memory than there is."""

    def __post_init__(self) -> None:
        check_at_least("nproc", self.nproc, 1)
        check_at_least("restarts", self.restarts, 0)
        if self.minutes is not None:
            check_positive("minutes", self.minutes)
