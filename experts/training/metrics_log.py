"""Reporting of a run's progress to `metrics.jsonl`, plugins and the launcher."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.files import os_errors_as_user_errors
from ...core.hooks.events import TrainingStep
from ...core.hooks.manager import PluginManager
from ...core.hooks.training import TrainablePart
from ...core.manifests.run import METRICS_FILE, RunSpec
from .loop import StepReport

if TYPE_CHECKING:
    from torch import Tensor

PROGRESS_SECONDS = 0.5

Tell = Callable[[Mapping[str, Any]], None]


class MetricsLog:
    """The log of one run, which continues from a checkpoint on resume."""

    def __init__(
        self,
        folder: Path,
        spec: RunSpec,
        plugins: PluginManager,
        tell: Tell,
        part: TrainablePart,
    ) -> None:
        self._measures, self._notes = part.measures, part.notes
        self._folder, self._spec, self._plugins, self._tell = folder, spec, plugins, tell
        self._path = folder / METRICS_FILE
        self._throughput = Throughput()
        self._losses: list[Tensor] = []
        self._reported_at = 0.0

    def open(self, start_step: int) -> None:
        """Drop the lines of steps that will be repeated, and report the start of the run."""
        if self._path.is_file():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= start_step]
            self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        training = self._spec.training
        self._tell(
            {
                "event": "started",
                "step": start_step,
                "total_steps": training.steps,
                "tokens_per_step": training.tokens_per_step,
                "notes": list(self._notes),
            }
        )
        self._throughput.take()

    def step(self, report: StepReport) -> None:
        """Record one optimiser step."""
        config = self._spec.training
        self._throughput.add(config.tokens_per_step)
        self._losses.append(report.loss)
        if report.step % config.log_every == 0 or report.step == config.steps:
            self._log(report)
        if time.monotonic() - self._reported_at >= PROGRESS_SECONDS:
            self._reported_at = time.monotonic()
            self._tell({"event": "progress", "step": report.step, "loss": float(report.loss)})

    def _log(self, report: StepReport) -> None:
        record = {
            "loss": float(sum(self._losses) / len(self._losses)),
            "learning_rate": report.learning_rate,
            "gradient_norm": float(report.gradient_norm),
            "tokens_per_second": self._throughput.take(),
            **(self._measures() if self._measures is not None else {}),
        }
        self._losses.clear()
        self._write({"step": report.step, **record})
        self._plugins.training_step(
            TrainingStep(self._spec.name, self._folder, report.step, self._spec.training.steps, record)
        )

    def validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Record the validation losses; the time of validation is excluded from the throughput."""
        self._write({"step": step, "validation_loss": dict(losses)})
        self._throughput.pause()

    def _write(self, record: Mapping[str, Any]) -> None:
        with os_errors_as_user_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class Throughput:
    """Training throughput in tokens per second since the last call of `take`."""

    def __init__(self) -> None:
        self._since, self._tokens, self._seconds = time.perf_counter(), 0, 0.0

    def add(self, tokens: int) -> None:
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        self._tokens += tokens

    def pause(self) -> None:
        """Exclude the time since the last `add`."""
        self._since = time.perf_counter()

    def take(self) -> float:
        rate = self._tokens / max(self._seconds, 1e-9)
        self._tokens, self._seconds = 0, 0.0
        self._since = time.perf_counter()
        return rate


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # drops a line truncated by a crash
