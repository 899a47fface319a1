"""Schedulers: queues of a cluster, whose jobs outlive the command that submits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .worker_command import WORKER_ENVIRONMENT, worker_command


@dataclass(frozen=True)
class Job:
    """One attempt to train a run, for a scheduler to queue."""

    run: Path
    """Folder of the run, on storage that the nodes share."""
    log: Path
    """File to which the job's output is to be appended; may be left out where the scheduler keeps the output."""
    records: Path
    """File to which the worker writes its progress and its outcome."""

    @property
    def name(self) -> str:
        """Name of the job for users: `expertctl-law`."""
        return f"expertctl-{self.run.name}"

    def command(self, *torchrun: str, strategy: str = "ddp") -> list[str]:
        """Return the command that trains the run and returns when it has ended; SIGTERM or SIGUSR1 saves its state first.

        With options of torchrun, such as `--nproc-per-node=2`, several processes train it together; start the command
        once on every node.
        """
        variables = [f"{name}={value}" for name, value in WORKER_ENVIRONMENT.items()]
        arguments = ("--records", str(self.records), "--strategy", strategy)
        return ["env", *variables, *worker_command(self.run, *arguments, torchrun=torchrun)]


@dataclass(frozen=True)
class JobState:
    """State of a job, as its scheduler sees it."""

    state: Literal["pending", "running", "ended", "lost", "cancelled"]
    """`ended`: by itself, well or not; `lost`: through no fault of the run (preempted, time limit, failed node), so that it
    is submitted again; `cancelled`: by a user or an administrator."""
    node: str | None = None
    """Where it runs."""
    reason: str | None = None
    """What the scheduler says of it, such as `PREEMPTED`, or why it is still pending."""


@dataclass(frozen=True)
class Scheduler:
    """A queue of jobs. Its functions raise `UserError` with one line for what the user can fix."""

    submit: Callable[[Job], str]
    """Queues a job and returns its id."""
    states: Callable[[Sequence[str]], Mapping[str, JobState]]
    """Returns the states of jobs by id; jobs that it does not know any more may be left out and count as lost."""
    cancel: Callable[[Sequence[str]], None]
    """Ends jobs: pending ones at once, running ones by a SIGTERM or SIGUSR1 and enough time to save their state."""
    restarts: int = 3
    """How often in a row a run is submitted again without a new checkpoint since the last time."""
    poll_seconds: float = 10.0
    """Seconds between two calls of `states`."""
    can_detach: bool = True
    """Whether jobs outlive the command that submits them."""
