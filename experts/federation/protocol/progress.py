"""Progress messages of an owner's training run: step counts, loss, time left and a failure code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from .fields import Message

ProgressState = Literal["waiting", "training", "ready", "failed"]
FailureCode = Literal["", "SEED", "DATA", "TRAINING", "PRIVACY", "DISK", "STOPPED"]
Amount = Annotated[float, Field(ge=0, lt=1e15, allow_inf_nan=False)]


@dataclass(frozen=True)
class Progress(Message):
    """Progress of one training run."""

    LABEL = "a progress message"
    OPTIONAL = frozenset({"step", "steps", "loss", "seconds_left", "code"})

    state: ProgressState
    step: Annotated[int, Field(ge=0, lt=10**15)] = 0
    """Optimiser steps done."""
    steps: Annotated[int, Field(ge=0, lt=10**15)] = 0
    """Optimiser steps in total; 0 while unknown."""
    loss: Amount | None = None
    """Loss at the last logged step, nats per token, to two decimals; None if unknown or withheld."""
    seconds_left: Amount | None = None
    """Estimated seconds until the end; None if unknown."""
    code: FailureCode = ""
    """Phase or cause of a failure; empty without one."""
