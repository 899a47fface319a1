"""The job of one run: submitted once whoever asks, read while it trains, submitted again if it was stopped."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from ....core.config.settings import LauncherConfig
from ....core.manifests.run import JOB_FOLDER, LOG_FILE, is_finished
from ....core.process.scheduling import Job, JobState, Scheduler
from ....core.reporting import LaunchResult, Reporter
from .job_file import SubmittedJob, command_lock, forget_job, job_lock, newest_checkpoint, read_job
from .worker_records import RecordsFile, Warnings, WorkerRecords, last_line

OUTPUT_BYTES = 1 << 20
"""End of a job's output that is searched for warnings and its last line."""


@dataclass(frozen=True)
class ScheduledRun:
    """A run, and where its jobs go."""

    folder: Path
    launcher: LauncherConfig
    scheduler: Scheduler


class RunJob:
    """Follows the job of one run until `result` is set."""

    def __init__(self, run: ScheduledRun, reporter: Reporter, warnings: Warnings) -> None:
        self.run, self._reporter, self._warnings = run, reporter, warnings
        self._folder = run.folder
        self._file: RecordsFile | None = None
        self.job: SubmittedJob | None = None
        self.result: LaunchResult | None = None
        self._is_stopping = False
        self._owned = ExitStack()

    @property
    def is_followed(self) -> bool:
        """Whether the run has a job whose end is awaited."""
        return self.job is not None and self.result is None

    @property
    def _records(self) -> WorkerRecords:
        assert self._file is not None, "a job was submitted or attached"
        return self._file.records

    # --- begin ---

    def attach(self) -> None:
        """Follow the job that another command submitted, if there is one; raises `UserError` if that one has to end it."""
        if not self.run.scheduler.can_detach:  # only the command that submits a job knows of it
            self._owned.enter_context(command_lock(self._folder))
        with job_lock(self._folder):
            self._attach_to_current()
        if self.job is not None:
            self._reporter.say(f"{self._folder.name}: job {self.job.id} was submitted {self.job.submitted_at}")

    def submit(self) -> None:
        """Submit the run, unless another command has; raises `UserError` if the scheduler refuses."""
        with job_lock(self._folder):
            if not self._attach_to_current():
                self._submit(attempt=1, failures=0)

    def _attach_to_current(self) -> bool:
        current = read_job(self._folder)
        if current is None or current.outcome is not None:
            return False
        if current.is_cancelled:  # the command that cancelled it was killed, or the user wants it to go on
            current = replace(current, is_cancelled=False)
            current.write(self._folder)
        self._follow(current)
        return True

    def _submit(self, *, attempt: int, failures: int) -> None:
        records = self._folder / JOB_FOLDER / f"records-{secrets.token_hex(4)}.jsonl"
        records.parent.mkdir(exist_ok=True)
        checkpoint = newest_checkpoint(self._folder)
        job = SubmittedJob(
            id=self.run.scheduler.submit(Job(self._folder, self._folder / LOG_FILE, records)),
            launcher=self.run.launcher,
            submitted_at=datetime.now(UTC).isoformat(timespec="seconds"),
            records=records.name,
            attempt=attempt,
            checkpoint=checkpoint,
            failures=failures,
        )
        job.write(self._folder)
        self._follow(job)

    def _follow(self, job: SubmittedJob) -> None:
        self.job = job
        path = self._folder / JOB_FOLDER / job.records
        self._file = RecordsFile(path, WorkerRecords(self._folder, self._reporter))

    # --- while it runs ---

    def read_records(self) -> None:
        """Report the progress since the last call."""
        if self._file is not None:
            self._file.read()

    @property
    def event(self) -> str | None:
        """How the worker says that it ended: `finished`, `interrupted`, `error`; None while it trains."""
        return self._records.event

    def mark_cancelled(self) -> str | None:
        """Keep other commands from submitting the run again; returns the id to cancel, None if the job has ended."""
        self._is_stopping = True
        with job_lock(self._folder):
            current = read_job(self._folder)
            if current is None or current.outcome is not None:
                return None
            replace(current, is_cancelled=True).write(self._folder)
            return current.id

    # --- its end ---

    def settle(self, state: JobState) -> None:
        """Set the result of a job that has ended, or submit the run again; raises `UserError` if that is refused."""
        assert self.job is not None
        self.read_records()
        with job_lock(self._folder):
            current = read_job(self._folder)
            if self.event == "finished" or is_finished(self._folder):
                self._warnings.forward(self._output())
                forget_job(self._folder)
                self._end(LaunchResult(self._folder, None))
            elif current is None:
                self.fail("another command has replaced or removed the run")
            elif current.outcome is not None:
                self._end(_result_of(self._folder, current))
            elif current.records != self.job.records:  # another command has submitted it again
                if self._is_stopping:
                    self._end(LaunchResult(self._folder, None, interrupted=True))
                else:
                    self._follow(current)
            elif self.event == "error":
                self._conclude(replace(current, outcome="failed", error=str(self._records.outcome["message"])))
            elif current.is_cancelled or self._is_stopping or state.state == "cancelled":
                self._conclude(replace(current, outcome="interrupted"))
            else:
                self._restart(current, state)

    def _restart(self, current: SubmittedJob, state: JobState) -> None:
        """Submit the run again from its last checkpoint, if that can help."""
        has_progressed = newest_checkpoint(self._folder) > current.checkpoint
        failures = 0 if has_progressed else current.failures + 1
        ended = f"job {current.id} ended" + (f" ({state.reason})" if state.reason else "")
        is_broken = state.state == "ended" and not self._records.has_started
        if is_broken or failures > self.run.scheduler.restarts:
            when = " before training began" if is_broken else ""
            line = last_line(self._output())
            output = f": {line} (full output in {self._folder / LOG_FILE})" if line else ""
            self._conclude(replace(current, outcome="failed", error=f"its {ended}{when}{output}"))
            return
        self._submit(attempt=current.attempt + 1, failures=failures)
        assert self.job is not None
        self._reporter.say(
            f"{self._folder.name}: {ended}; submitted again as job {self.job.id}, from the last checkpoint"
        )

    def leave(self, reason: str) -> None:
        """Stop following the job, which goes on."""
        self._reporter.say(f"{self._folder.name}: {reason}")
        self._end(LaunchResult(self._folder, None, interrupted=True))

    def fail(self, error: str) -> None:
        """Set a result without a job."""
        self._end(LaunchResult(self._folder, error))

    def _conclude(self, job: SubmittedJob) -> None:
        self._warnings.forward(self._output())
        job.write(self._folder)
        self._end(_result_of(self._folder, job))

    def _end(self, result: LaunchResult) -> None:
        self.result = result
        self._owned.close()
        self._reporter.run_finished(result)

    def _output(self) -> str:
        """Return the end of the job's output."""
        path = self._folder / LOG_FILE
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - OUTPUT_BYTES, 0))
            return file.read().decode(errors="replace")


def _result_of(run: Path, job: SubmittedJob) -> LaunchResult:
    return LaunchResult(run, job.error, interrupted=job.outcome == "interrupted")
