"""What an owner says of a training while it goes on: a few numbers, and a code where it failed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from ....core.errors import UserError

ProgressState = Literal["waiting", "training", "ready", "failed"]
FailureCode = Literal["", "SEED", "DATA", "TRAINING", "PRIVACY", "DISK", "STOPPED"]


@dataclass(frozen=True)
class Progress:
    """How far a training has come."""

    state: ProgressState
    step: int = 0
    steps: int = 0
    loss: float | None = None
    """Of the last step that was logged, nats per token, to two places."""
    seconds_left: float | None = None
    code: FailureCode = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, content: Any) -> Progress:
        """Read what `as_json` gives; raises `UserError` for anything else, since it comes from outside."""
        try:
            found = cls(**content)
        except TypeError:
            raise UserError("that is no progress of this version") from None
        numbers = (found.step, found.steps, found.loss or 0, found.seconds_left or 0)
        if (
            found.state not in get_args(ProgressState)
            or found.code not in get_args(FailureCode)
            or not all(
                isinstance(one, int | float) and math.isfinite(one) and 0 <= one < 1e15 for one in numbers
            )
        ):
            raise UserError("that progress makes no sense")
        return found
