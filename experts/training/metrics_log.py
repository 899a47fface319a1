"""Reporting of a run's progress to `metrics.jsonl`, trackers, plugins and the launcher."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.artefacts.json_lines import JsonLines
from ...core.hooks.events import TrainingStep
from ...core.hooks.manager import installed_plugins
from ...core.hooks.training import TrainablePart
from ...core.manifests.run import METRICS_FILE
from ...core.reporting import Reporter
from ...core.tracking.tracking import Tracking
from .run_inputs import RunInputs
from .steps.guards import Spike
from .steps.loop import StepReport

PROGRESS_SECONDS = 0.5


class MetricsLog:
    """The log of one run, which continues from a checkpoint on resume."""

    def __init__(
        self, run: RunInputs, reporter: Reporter, part: TrainablePart, trackers: Tracking, notes: Sequence[str] = ()
    ) -> None:
        """Begin the log of a run; `notes` are lines for the user."""
        self._notes = notes
        self._folder, self._spec, self._reporter, self._part = run.folder, run.spec, reporter, part
        self._trackers = trackers
        # a resumed run repeats the steps after its checkpoint, so lines that a power failure takes are written again
        self._file = JsonLines(run.folder / METRICS_FILE, dict, durable=False)
        self._throughput = Throughput()
        self._losses: list[Tensor] = []
        self._skipped = 0
        self._reported_at = 0.0
        self._drawn: Counter[int] = Counter()
        self._domains = [domain.name for domain in run.all_domains] if run.annealing else []

    def open(self, start_step: int) -> None:
        """Drop the lines of steps that will be repeated, and report the start of the run."""
        self._drop_after(start_step)
        training = self._spec.training
        self._reporter.run_progressed(
            self._folder,
            {
                "event": "started",
                "step": start_step,
                "total_steps": training.steps,
                "tokens_per_step": training.tokens_per_step,
                "notes": list(self._notes),
            },
        )
        self._throughput.take()

    def _drop_after(self, step: int) -> None:
        if self._file.path.is_file():
            self._file.rewrite(record for record in self._file.read() if record["step"] <= step)

    def rolled_back(self, step: int, from_step: int, spike: Spike) -> None:
        """Record that a spike took training back to `step`, and drop the lines of the steps that this undoes."""
        self._drop_after(step)
        self._losses.clear()
        self._drawn.clear()
        self._skipped = 0
        details = {"from_step": from_step, "loss": spike.loss, "limit": spike.limit}
        self._file.append({"step": step, "rolled_back": details})
        self._trackers.roll_back(step)
        self._trackers.log(step, {f"rolled_back/{name}": value for name, value in details.items()})
        note = (
            f"the loss rose to {spike.loss:.3f} (limit {spike.limit:.3f}); back from step {from_step} to {step}, and on with "
            "the text after it"
        )
        self._reporter.run_progressed(self._folder, {"event": "progress", "step": step, "notes": [note]})

    def step(self, report: StepReport) -> None:
        """Record one optimiser step."""
        config = self._spec.training
        self._throughput.add(config.tokens_per_step)
        self._drawn.update(report.drawn)
        if report.skipped:
            self._skipped += 1
        else:
            self._losses.append(report.loss)
        if report.step % config.log_every == 0 or report.step == config.steps:
            self._log(report)
        if time.monotonic() - self._reported_at >= PROGRESS_SECONDS:
            self._reported_at = time.monotonic()
            record: dict[str, Any] = {"event": "progress", "step": report.step}
            if not report.skipped:
                record["loss"] = float(report.loss)
            self._reporter.run_progressed(self._folder, record)

    def _log(self, report: StepReport) -> None:
        record: dict[str, float] = {
            "learning_rate": report.learning_rate,
            "tokens_per_second": self._throughput.take(),
            **self._part.measures(),
        }
        if self._losses:
            record = {"loss": float(sum(self._losses) / len(self._losses)), **record}
        if not report.skipped:
            record["gradient_norm"] = float(report.gradient_norm)
        if self._skipped:
            record["skipped_steps"] = self._skipped
        total = self._drawn.total()
        record |= {f"share/{name}": self._drawn[number] / total for number, name in enumerate(self._domains)}
        self._drawn.clear()
        self._losses.clear()
        self._skipped = 0
        self._file.append({"step": report.step, **record})
        self._trackers.log(report.step, record)
        installed_plugins().training_step(
            TrainingStep(self._spec.name, self._folder, report.step, self._spec.training.steps, record)
        )

    def validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Record the validation losses; the time of validation is excluded from the throughput."""
        self._file.append({"step": step, "validation_loss": dict(losses)})
        self._trackers.log(step, {f"validation_loss/{domain}": loss for domain, loss in losses.items()})
        self._throughput.pause()


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
