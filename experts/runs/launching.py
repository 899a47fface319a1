"""Order and launching of training runs, and collection of their results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...core.artefacts.files import json_text
from ...core.config.settings import ExpertConfig, LauncherConfig
from ...core.errors import Interrupted, UserError
from ...core.hooks.manager import installed_plugins
from ...core.hooks.options import parse_options
from ...core.hooks.training import Launcher
from ...core.manifests.run import RUN_FILE
from ...core.process.scheduling import Scheduler
from ...core.reporting import SILENT, LaunchResult, Reporter
from .jobs.job_queue import JobQueue
from .jobs.run_job import ScheduledRun
from .jobs.status import require_no_job

JobCount = int | Literal["auto"] | None
"""How many runs train at a time; `auto`: as many as fit. None: one on this machine, all in the queue of a scheduler."""


@dataclass(frozen=True)
class TrainResult:
    """Results of several training runs, by run name."""

    finished: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)
    """Run name -> one-line error."""
    interrupted: tuple[str, ...] = ()
    submitted: Mapping[str, str] = field(default_factory=dict)
    """With `detach`: run name -> id of the job that goes on."""
    waiting: tuple[str, ...] = ()
    """With `detach`: runs that were not submitted, since there was no room or they start from an unfinished one."""

    def raise_for_failures(self) -> None:
        """Raise `UserError` that lists every failed run, or `Interrupted` if runs were stopped."""
        if self.interrupted:
            raise Interrupted(f"{', '.join(self.interrupted)}: stopped, state saved; rerun the same command to resume")
        if self.failed:
            raise UserError("; ".join(f"{name}: {error}" for name, error in self.failed.items()))


def launch(
    runs: Sequence[Path],
    jobs: JobCount,
    launcher: LauncherConfig,
    reporter: Reporter = SILENT,
    *,
    own_launchers: Mapping[Path, LauncherConfig] | None = None,
    detach: bool = False,
) -> TrainResult:
    """Train runs with a launcher, or those of `own_launchers` with their own, `jobs` at a time; a failed run does not raise.

    With `detach`, jobs are submitted and go on. Raises `UserError` for an unknown launcher, invalid options, or a launcher
    that cannot do what is asked.
    """
    _Group.of(launcher, runs)  # checked even if every run has its own
    groups = _by_launcher(runs, launcher, own_launchers or {})
    if detach:
        for group in groups:
            group.require_detachable()
    scheduled = [run for group in groups for run in group.scheduled()]
    queue = JobQueue(scheduled, jobs if isinstance(jobs, int) else len(scheduled), reporter)
    if detach:
        queue.submit()
        return _collect(queue.detach())
    results: list[LaunchResult] = []
    try:
        queue.submit()
        for group in groups:
            results += group.train(jobs, reporter)
            if any(result.interrupted for result in results):
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        queue.stop()
        reached = {result.run for result in results} | {run.folder for run in scheduled}
        results += [LaunchResult(run, None, interrupted=True) for run in runs if run not in reached]
    return _collect([*results, *queue.follow()])


@dataclass(frozen=True)
class _Group:
    """Runs that a launcher trains with the same options."""

    runs: tuple[Path, ...]
    config: LauncherConfig
    launcher: Launcher
    options: Any
    scheduler: Scheduler | None

    @classmethod
    def of(cls, config: LauncherConfig, runs: Iterable[Path]) -> _Group:
        launcher = installed_plugins().offer(Launcher, config.name)
        options = parse_options(launcher.options, config.options, f"launcher '{launcher.name}'")
        scheduler = launcher.scheduler(options) if launcher.scheduler is not None else None
        return cls(tuple(runs), config, launcher, options, scheduler)

    def require_detachable(self) -> None:
        if self.scheduler is None or not self.scheduler.can_detach:
            raise UserError(
                f"runs of launcher '{self.launcher.name}' end with the command that starts them; leave out --detach, or "
                "choose a launcher with a queue, such as slurm"
            )

    def scheduled(self) -> list[ScheduledRun]:
        """Return the runs for the queue of a scheduler, if the launcher has one."""
        return [ScheduledRun(run, self.config, self.scheduler) for run in self.runs] if self.scheduler else []

    def train(self, jobs: JobCount, reporter: Reporter) -> list[LaunchResult]:
        """Train the runs, if the launcher does it by itself, but for those that a job trains already."""
        if self.launcher.launch is None:
            return []
        results, free = [], []
        for run in self.runs:
            try:
                require_no_job(run)
                free.append(run)
            except UserError as error:
                results.append(LaunchResult(run, str(error)))
        return [*results, *self.launcher.launch(free, self._count(free, jobs), reporter, self.options)]

    def _count(self, runs: Sequence[Path], jobs: JobCount) -> int:
        if jobs != "auto":
            return jobs or 1
        if self.launcher.fitting_jobs is None:
            raise UserError(f"launcher '{self.launcher.name}' cannot tell how many runs fit; give --jobs a number")
        return self.launcher.fitting_jobs(runs, self.options)


def _by_launcher(runs: Sequence[Path], launcher: LauncherConfig, own: Mapping[Path, LauncherConfig]) -> list[_Group]:
    configs: dict[str, LauncherConfig] = {}
    members: dict[str, list[Path]] = {}
    for run in runs:
        config = own.get(run, launcher)
        key = json_text(config.model_dump())
        configs[key] = config
        members.setdefault(key, []).append(run)
    return [_Group.of(config, members[key]) for key, config in configs.items()]


def _collect(results: Sequence[LaunchResult]) -> TrainResult:
    return TrainResult(
        finished=tuple(
            result.run.name for result in results if not (result.error or result.interrupted or result.job is not None)
        ),
        failed={result.run.name: result.error for result in results if result.error},
        interrupted=tuple(result.run.name for result in results if result.interrupted),
        submitted={result.run.name: result.job for result in results if result.job is not None},
    )


def next_wave(pending: Sequence[str], declared: Mapping[str, ExpertConfig], experts: Path) -> list[str]:
    """Return the pending experts to train next: first those from the seed or already branched, then their children.

    `declared` are the experts of `expertctl.yaml`, which must include those not yet branched below `experts`.
    """
    starts = {name: "seed" if (experts / name / RUN_FILE).is_file() else declared[name].from_ for name in pending}
    ready = [name for name, start in starts.items() if start == "seed"]
    if ready:
        return ready
    ready = [
        name
        for name, start in starts.items()
        if start != "auto" and not set([start] if isinstance(start, str) else start) & set(pending)
    ]
    return ready or list(pending[:1])  # `auto` one at a time: each can start from those before it
