"""Progress display: bars on a terminal, otherwise a plain line every few seconds, nothing when quiet.

Work that ends within two seconds shows no progress. All output goes to standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock, Timer
from typing import TYPE_CHECKING, Any, Self, TextIO

from ..reporting import LaunchResult, Reporter, printable

if TYPE_CHECKING:
    from rich import progress as rich_progress

SILENT_SECONDS = 2.0
LINE_SECONDS = 5.0

Clock = Callable[[], float]


@dataclass
class Job:
    """One task with progress, such as a training run."""

    name: str
    unit: str
    """Unit of progress in the plural: `steps`, `documents`."""
    total: int | None
    """Total number of units; None if unknown."""
    begun_at: float
    """Clock time of the start, in seconds."""
    begun_done: int = 0
    """Units done by an earlier attempt, which do not count towards the speed."""
    done: int = 0
    tokens_per_unit: int = 0
    """0 for work that is not measured in tokens."""
    loss: float | None = None

    def figures(self, now: float) -> list[str]:
        """Return units done, loss, token rate and time left at the mean speed so far, as far as they are known."""
        seconds = now - self.begun_at
        speed = (self.done - self.begun_done) / seconds if seconds > 0 else 0.0  # units per second
        of_total = "" if self.total is None else f" of {self.total:,}"
        figures = [f"{self.done:,}{of_total} {self.unit}"]
        if self.loss is not None:
            figures.append(f"loss {self.loss:.3f}")
        if self.tokens_per_unit and speed > 0:
            figures.append(f"{speed * self.tokens_per_unit:,.0f} tokens/s")
        if self.total not in (None, self.done) and speed > 0:
            figures.append(f"{duration((self.total - self.done) / speed)} left")
        return figures


def duration(seconds: float) -> str:
    """Format a duration as `0:07`, `12:30` or `1:02:03`."""
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}" if hours else f"{minutes}:{whole_seconds:02}"


class Display:
    """A display of jobs; this one shows nothing."""

    def open(self, expected: Sequence[str]) -> None:
        """Start the display; `expected` are the names of the known future jobs."""

    def show(self, job: Job) -> None: ...
    def say(self, line: str) -> None: ...
    def close(self) -> None: ...


class Lines(Display):
    """A display for log files and pipes: one line per job, at most every few seconds."""

    def __init__(self, stream: TextIO | None = None, clock: Clock = time.monotonic) -> None:
        self._stream, self._clock = stream or sys.stderr, clock
        self._shown_at: dict[str, float] = {}

    def show(self, job: Job) -> None:
        now = self._clock()
        shown_at = self._shown_at.get(job.name)
        due = job.begun_at + SILENT_SECONDS if shown_at is None else shown_at + LINE_SECONDS
        if now >= due:
            self._shown_at[job.name] = now
            share = "" if job.total is None else f"{job.done / max(job.total, 1):.0%}, "
            self.say(f"{job.name}: {share}{', '.join(job.figures(now))}")

    def say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class Bars(Display):
    """A display of one rich progress bar per job, which appears after two seconds."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._expected: tuple[str, ...] = ()
        self._tasks: dict[str, rich_progress.TaskID] = {}
        self._progress: rich_progress.Progress | None = None
        self._closed = False
        self._lock = RLock()
        self._timer = Timer(SILENT_SECONDS, self._appear)
        self._timer.daemon = True

    def open(self, expected: Sequence[str]) -> None:
        self._expected = tuple(expected)
        self._timer.start()

    def show(self, job: Job) -> None:
        with self._lock:
            self._jobs[job.name] = job
            self._draw(job)

    def say(self, line: str) -> None:
        with self._lock:
            if self._progress is None:
                print(line, file=sys.stderr, flush=True)
            else:
                self._progress.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._progress is not None:
                self._progress.stop()

    def _appear(self) -> None:
        from rich import progress as rich_progress
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn

        with self._lock:
            if self._closed:
                return
            self._progress = rich_progress.Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=Console(stderr=True),
            )
            self._progress.start()
            for name in self._expected:  # rich animates a bar without a total
                self._tasks[name] = self._progress.add_task(name, total=None, figures="")
            for job in self._jobs.values():
                self._draw(job)

    def _draw(self, job: Job) -> None:
        if self._progress is None:
            return
        if job.name not in self._tasks:
            self._tasks[job.name] = self._progress.add_task(job.name, total=job.total, figures="")
        figures = "  ".join(job.figures(time.monotonic()))
        self._progress.update(self._tasks[job.name], total=job.total, completed=job.done, figures=figures)


def display(*, quiet: bool = False, plain: bool = False) -> Display:
    """Return the display for standard error: bars on a terminal, otherwise lines; nothing if `quiet`."""
    if quiet:
        return Display()
    return Lines() if plain or not sys.stderr.isatty() else Bars()


class Progress(Reporter):
    """Reporter and context manager that shows work on a display; `expected` are the names of known future jobs."""

    def __init__(self, where: Display, expected: Sequence[str] = (), clock: Clock = time.monotonic) -> None:
        self._display, self._expected, self._clock = where, expected, clock
        self._jobs: dict[str | Path, Job] = {}
        self._lock = RLock()  # work reports from several threads

    def __enter__(self) -> Self:
        self._display.open(self._expected)
        return self

    def __exit__(self, *exception: object) -> None:
        self._display.close()

    def say(self, line: str) -> None:
        self._display.say(printable(line))

    def progress(self, task: str, done: int, total: int | None = None, unit: str = "") -> None:
        with self._lock:
            job = self._jobs.setdefault(task, Job(task, unit, total, self._clock()))
            job.done, job.total = done, total
            self._display.show(job)

    def run_started(self, run: Path, total_steps: int) -> None:
        with self._lock:
            self._jobs[run] = Job(run.name, "steps", total_steps, self._clock())

    def run_progressed(self, run: Path, record: Mapping[str, Any]) -> None:
        with self._lock:
            job = self._jobs[run]
            job.done = int(record["step"])
            job.loss = record.get("loss", job.loss)
            job.tokens_per_unit = int(record.get("tokens_per_step", job.tokens_per_unit))
            if record.get("event") == "started":
                job.begun_done = job.done
            for note in record.get("notes", ()):
                self._display.say(f"{run.name}: {note}")
            self._display.show(job)

    def run_finished(self, result: LaunchResult) -> None:
        with self._lock:
            job = self._jobs.get(result.run)
            if job is not None and job.total is not None and result.error is None and not result.interrupted:
                job.done = job.total
                self._display.show(job)
