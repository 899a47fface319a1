"""Events: what notifying hooks receive, and experiment trackers, which record runs and merges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .option_checks import check_options_class


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


# --- trackers ---

RunOutcome = Literal["finished", "interrupted", "failed"]
"""`interrupted`: stopped with its state saved, to be resumed. Errors are not passed on: their text can name files."""


@dataclass(frozen=True)
class TrackedRun:
    """A training run or a merge, as trackers know it. It holds no text of documents."""

    name: str
    """Name of the artefact."""
    kind: Literal["seed", "expert", "generalist", "merge"]
    """`generalist`: a tuning."""
    folder: Path
    """Folder of the artefact; trackers must not change it."""
    store: Path
    """Folder of the workspace for the tracker's own files, which all runs share; it exists."""
    id: str
    """Random letters and digits, the same when the run is resumed and others when it is started over."""
    configuration: Mapping[str, Any]
    """Settings, and digests of parents and text: JSON content, nested."""
    first_step: int = 0
    """Steps already done. Of a resumed run, what was logged after this step is undone and will be logged again."""


class RunTracker(ABC):
    """Records one run. It is used in a process of its own: an error or a hang ends the tracking, not the run."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record numbers after `step` optimiser steps: those of `metrics.jsonl`, and `validation_loss/DOMAIN`."""

    def roll_back(self, step: int) -> None:  # noqa: B027  # optional
        """Forget what was logged after `step`, if that is possible: a spike took training back to it."""

    @abstractmethod
    def finish(self, outcome: RunOutcome, summary: Mapping[str, Any]) -> None:
        """Record the end; `summary` has the `digest` of a finished artefact. Nothing is called after it."""


@dataclass(frozen=True)
class Tracker:
    """An experiment tracker."""

    name: str
    summary: str
    open: Callable[[TrackedRun, Any], RunTracker]
    """`open(run, options)` begins or resumes the record of a run."""
    options: type | None = None
    """A frozen dataclass with a default for every field, or None."""
    module: str | None = None
    """Module that `open` imports; if it is missing, runs are refused before they start."""
    install: str | None = None
    """What `pip install` gets to install `module`."""

    def __post_init__(self) -> None:
        check_options_class(self.options, f"tracker '{self.name}'")
