"""Events that notifying hooks receive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainingStep:
    """One optimiser step of a run, as `training_step` hooks see it."""

    run: str
    folder: Path
    step: int
    total_steps: int
    metrics: Mapping[str, float]
    """`loss` in nats per token, `learning_rate`, `gradient_norm`, `tokens_per_second`."""


@dataclass(frozen=True)
class ExpertFinished:
    """An expert folder that is complete."""

    name: str
    folder: Path


@dataclass(frozen=True)
class MergeFinished:
    """A generalist folder that is complete."""

    name: str
    folder: Path
    method: str
