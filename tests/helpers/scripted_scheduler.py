"""A scheduler without processes: each job does at once what a script says, and writes what a worker would."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertctl import Job, JobState, Scheduler, UserError
from expertctl.core.artefacts.digests import MANIFEST_NAMES
from expertctl.core.manifests.run import STATE_FOLDER

STATES = {
    "finish": "ended",
    "error": "ended",
    "save": "ended",
    "kill": "ended",
    "die early": "ended",
    "lose": "lost",
    "cancel": "cancelled",
    "hang": "running",
    "wait": "pending",
}


@dataclass(frozen=True)
class Act:
    """What a job does before it ends."""

    ending: str
    """A key of `STATES`; jobs that `hang` or `wait` end when they are cancelled."""
    is_progress: bool = False
    """Whether it writes a checkpoint."""


class ScriptedScheduler:
    """Plays acts job by job; the last one is repeated."""

    def __init__(self, *acts: Act | str, restarts: int = 3, can_detach: bool = True) -> None:
        self.acts = [Act(act) if isinstance(act, str) else act for act in acts]
        self.restarts, self.can_detach = restarts, can_detach
        self.jobs: list[tuple[Job, Act]] = []
        self.cancelled: set[str] = set()
        self.most_live = 0
        self.is_silent = False

    @property
    def scheduler(self) -> Scheduler:
        return Scheduler(self.submit, self.states, self.cancel, self.restarts, 0.0, self.can_detach)

    def submit(self, job: Job) -> str:
        act = self.acts[min(len(self.jobs), len(self.acts) - 1)]
        assert job.run not in self._live(), f"a second job for {job.run.name}"
        self.jobs.append((job, act))
        self.most_live = max(self.most_live, len(self._live()))
        _play(job, act, len(self.jobs))
        return str(len(self.jobs))

    def _live(self) -> list[Path]:
        live = [(str(number), *pair) for number, pair in enumerate(self.jobs, start=1)]
        return [
            job.run
            for number, job, act in live
            if STATES[act.ending] in ("running", "pending") and number not in self.cancelled
        ]

    def states(self, ids: Sequence[str]) -> Mapping[str, JobState]:
        if self.is_silent:
            raise UserError("the scheduler does not answer")
        return {job_id: self._state(job_id) for job_id in ids}

    def _state(self, job_id: str) -> JobState:
        word: Any = STATES[self.jobs[int(job_id) - 1][1].ending]
        return JobState("ended" if job_id in self.cancelled else word, "node7", "said so")

    def cancel(self, ids: Sequence[str]) -> None:
        self.cancelled |= set(ids)


def _play(job: Job, act: Act, number: int) -> None:
    """Leave the files of a worker."""
    records: list[dict[str, Any]] = []
    if act.ending not in ("die early", "wait"):
        records.append({"event": "started", "step": 0, "total_steps": 9})
    if act.is_progress:
        (job.run / STATE_FOLDER / f"step-{number:08d}").mkdir(parents=True)
    if act.ending == "finish":
        (job.run / MANIFEST_NAMES["expert"]).write_text("{}")
    outcome = {"finish": "finished", "error": "error", "save": "interrupted"}.get(act.ending)
    if outcome is not None:
        records.append({"event": outcome, "message": "as scripted"})
    if act.ending != "wait":
        job.log.write_text("Warning: as scripted\nlast words\n")
        job.records.write_text("".join(json.dumps(record) + "\n" for record in records))
