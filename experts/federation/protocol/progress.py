"""Progress messages of an owner's training run: step counts, loss, time left and a failure code."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ....core.errors import UserError
from .fields import check_fields

ProgressState = Literal["waiting", "training", "ready", "failed"]
FailureCode = Literal["", "SEED", "DATA", "TRAINING", "PRIVACY", "DISK", "STOPPED"]


@dataclass(frozen=True)
class Progress:
    """Progress of one training run."""

    state: ProgressState
    step: int = 0
    """Optimiser steps done."""
    steps: int = 0
    """Optimiser steps in total; 0 while unknown."""
    loss: float | None = None
    """Loss at the last logged step, nats per token, to two decimals; None if unknown or withheld."""
    seconds_left: float | None = None
    """Estimated seconds until the end; None if unknown."""
    code: FailureCode = ""
    """Phase or cause of a failure; empty without one."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, content: Any) -> Progress:
        """Read the result of `as_json`; raises `UserError` for anything else, since it comes from outside."""
        check_fields(content, "a progress message", ("state",), (field.name for field in fields(cls)))
        progress = cls(**content)
        numbers = (progress.step, progress.steps, progress.loss or 0, progress.seconds_left or 0)
        if (
            progress.state not in get_args(ProgressState)
            or progress.code not in get_args(FailureCode)
            or not all(
                isinstance(number, int | float) and math.isfinite(number) and 0 <= number < 1e15 for number in numbers
            )
        ):
            raise UserError("a field of a progress message has an invalid value")
        return progress
