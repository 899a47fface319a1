"""Many runs in the queue of a scheduler: a number of jobs at a time, followed to their ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

from ....core.artefacts.files import json_text
from ....core.errors import UserError
from ....core.process.scheduling import JobState
from ....core.reporting import LaunchResult, Reporter
from .run_job import RunJob, ScheduledRun
from .worker_records import Warnings

READ_SECONDS = 0.5
"""Time between two looks at the records of the workers."""
STATES_PATIENCE_S = 900.0
"""How long the scheduler may fail to answer before the command ends; the jobs go on."""
CANCEL_PATIENCE_S = 900.0
"""How long cancelled jobs may take to save their state before the command ends."""
UNKNOWN = JobState("lost", reason="unknown to its scheduler")


class JobQueue:
    """The runs of one command whose launchers have a scheduler; at most `jobs` of them have a job at a time."""

    def __init__(self, runs: Sequence[ScheduledRun], jobs: int, reporter: Reporter) -> None:
        warnings = Warnings(reporter)
        self._runs = [RunJob(run, reporter, warnings) for run in runs]
        self._jobs, self._reporter = jobs, reporter
        self._polled_at, self._answered_at = float("-inf"), time.monotonic()
        self._stopped_at: float | None = None

    @property
    def results(self) -> list[LaunchResult]:
        return [job.result for job in self._runs if job.result is not None]

    def submit(self) -> None:
        """Attach to jobs that are under way and submit as many runs as there is room for; a refused run fails."""
        for job in self._unsubmitted():
            _or_fail(job, job.attach)
        self._fill()

    def detach(self) -> list[LaunchResult]:
        """Return a result for every run that has ended or has a job; the jobs go on, runs without a job have no result."""
        self._look()
        self._fill()
        followed = [(run.run.folder, run.job) for run in self._followed()]
        return [*self.results, *(LaunchResult(folder, None, job=job.id) for folder, job in followed if job is not None)]

    def follow(self) -> list[LaunchResult]:
        """Report progress until every run has ended. On Ctrl-C, running jobs save their state and end."""
        self._answered_at = time.monotonic()
        while any(job.result is None for job in self._runs):
            try:
                self._fill()
                self._look()
                time.sleep(READ_SECONDS)
            except KeyboardInterrupt:
                if self._stopped_at is not None:
                    raise
                self.stop()
        return self.results

    def stop(self) -> None:
        """Cancel all jobs with time for a checkpoint; runs without a job are not submitted any more."""
        self._stopped_at = time.monotonic()
        for job in self._unsubmitted():
            job.leave("not started")
        for group in self._groups():
            ids = [job_id for job in group if (job_id := job.mark_cancelled()) is not None]
            if ids:
                self._reporter.say(f"cancelling {', '.join(ids)}; waiting until their state is saved")
                try:
                    group[0].run.scheduler.cancel(ids)
                except UserError as error:
                    self._reporter.say(f"cannot cancel {', '.join(ids)}: {error}")

    def _unsubmitted(self) -> list[RunJob]:
        return [job for job in self._runs if job.job is None and job.result is None]

    def _followed(self) -> list[RunJob]:
        return [job for job in self._runs if job.is_followed]

    def _fill(self) -> None:
        for job in self._unsubmitted():
            if len(self._followed()) >= self._jobs:
                return
            _or_fail(job, job.submit)

    def _look(self) -> None:
        """Read the records of all workers; settle the jobs that have ended, as far as that is known by now."""
        for job in self._followed():
            job.read_records()
            if job.event in ("finished", "error"):
                _or_fail(job, partial(job.settle, JobState("ended")))
        followed = self._followed()
        poll_seconds = min((job.run.scheduler.poll_seconds for job in followed), default=0.0)
        has_stopped = any(job.event == "interrupted" for job in followed)
        if has_stopped or time.monotonic() >= self._polled_at + poll_seconds:
            self._poll()
        if self._stopped_at is not None and time.monotonic() > self._stopped_at + CANCEL_PATIENCE_S:
            for job in self._followed():
                job.leave(f"its job has not ended within {CANCEL_PATIENCE_S:g} seconds; it may go on")

    def _poll(self) -> None:
        self._polled_at = time.monotonic()
        for group in self._groups():
            try:
                states = self._states(group)
            except UserError as error:
                if time.monotonic() > self._answered_at + STATES_PATIENCE_S:
                    for job in group:
                        job.leave(f"{error}; its job goes on, follow it with the same command")
                continue
            self._answered_at = time.monotonic()
            for job, state in states:
                if state.state not in ("pending", "running"):
                    _or_fail(job, partial(job.settle, state))

    def _states(self, group: Sequence[RunJob]) -> list[tuple[RunJob, JobState]]:
        ids = [job.job.id for job in group if job.job is not None]
        states = group[0].run.scheduler.states(ids)
        return [(job, states.get(job_id, UNKNOWN)) for job, job_id in zip(group, ids, strict=True)]

    def _groups(self) -> Iterator[list[RunJob]]:
        """Yield the jobs that are followed, those of one launcher with the same options together."""
        key = _launcher_key
        for _, group in groupby(sorted(self._followed(), key=key), key=key):
            yield list(group)


def _launcher_key(job: RunJob) -> str:
    return json_text(job.run.launcher.model_dump())


def _or_fail(job: RunJob, action: Callable[[], None]) -> None:
    """Do a part of the work on one run; a `UserError` fails this run alone."""
    try:
        action()
    except UserError as error:
        job.fail(str(error))
