"""The `ray` launcher: every run is a task on a Ray cluster, or on a local one that ends with the command."""

from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...core.errors import UserError, first_line
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least
from ...core.hooks.training import Launcher
from ...core.process.scheduling import Job, JobState, Scheduler


@dataclass(frozen=True)
class RayOptions:
    """Options of the `ray` launcher."""

    address: str | None = None
    """Address of an existing cluster, or `auto` for the one of this machine. Default: a local cluster of its own."""
    cpus: float = 1
    """CPU cores that a run reserves."""
    gpus: float = 0
    """GPUs that a run reserves; it sees no others."""
    nproc: int = 1
    """Processes that train a run together, on one node."""
    strategy: Literal["ddp", "fsdp", "ep"] = "ddp"
    """How several processes hold the model: each the whole of it, each a part of every tensor, or each some experts of a
    mixture and a part of every other tensor."""
    restarts: int = 3
    """How often in a row a run is started again without a new checkpoint since the last time."""

    def __post_init__(self) -> None:
        for name in ("cpus", "gpus", "restarts"):
            check_at_least(name, getattr(self, name), 0)
        check_at_least("nproc", self.nproc, 1)


@hookimpl
def launchers() -> list[Launcher]:
    return [Launcher("ray", "a Ray task per run", options=RayOptions, scheduler=scheduler)]


def scheduler(options: RayOptions) -> Scheduler:
    """Return the tasks of this command; raises `UserError` if Ray is not installed."""
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise UserError("launcher 'ray' needs Ray, which is not installed: pip install 'expertctl[ray]'")
    tasks = _Tasks(options)
    return Scheduler(tasks.submit, tasks.states, tasks.cancel, options.restarts, poll_seconds=1.0, can_detach=False)


class _Tasks:
    """The tasks of one command; Ray ends them with it."""

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self._references: dict[str, Any] = {}

    def submit(self, job: Job) -> str:
        """Start a task; connects to the cluster first."""
        ray = _connected(self._options.address)
        nproc = self._options.nproc
        torchrun = ("--standalone", f"--nproc-per-node={nproc}") if nproc > 1 else ()
        command = [*job.command(*torchrun, strategy=self._options.strategy), "--leash", "0"]
        task = ray.remote(train).options(
            name=job.name, num_cpus=self._options.cpus, num_gpus=self._options.gpus, max_retries=0
        )
        reference = task.remote(command, str(job.run), str(job.log))
        job_id: str = reference.task_id().hex()[:12]
        self._references[job_id] = reference
        return job_id

    def states(self, ids: Sequence[str]) -> Mapping[str, JobState]:
        """Return the states of this command's tasks; those of another one ended with it."""
        return {job_id: self._state(self._references[job_id]) for job_id in ids if job_id in self._references}

    def _state(self, reference: Any) -> JobState:
        ray = _ray()
        if not ray.wait([reference], timeout=0)[0]:
            return JobState("running")
        try:
            return JobState("ended", reason=ray.get(reference))
        except ray.exceptions.TaskCancelledError:
            return JobState("cancelled")
        except ray.exceptions.RayError as error:  # the node or Ray's own process was lost
            return JobState("lost", reason=first_line(error))

    def cancel(self, ids: Sequence[str]) -> None:
        ray = _ray()
        for job_id in ids:
            if job_id in self._references:
                ray.cancel(self._references[job_id], force=False)


def _ray() -> Any:
    import ray  # pyright: ignore[reportMissingImports]  # too large to be installed for every development

    return ray


def _connected(address: str | None) -> Any:
    """Return the module, connected to a cluster; raises `UserError` if the cluster cannot be reached."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    ray = _ray()
    if ray.is_initialized():
        return ray
    try:
        dashboard = None if address else False
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=dashboard)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot reach the Ray cluster {address or 'of this machine'}: {first_line(error)}") from None
    return ray


def train(command: Sequence[str], run: str, log: str) -> str:
    """Run a worker on a node of the cluster and say how it ended; cancelling the task saves its state."""
    if not Path(run).is_dir():
        return f"node {platform.node()} does not have {run}; keep the workspace on storage that all nodes share"
    watched, held = os.pipe()  # the worker ends when the process of this task does
    with Path(log).open("ab") as output:
        worker = subprocess.Popen(command, stdin=watched, stdout=output, stderr=output, start_new_session=True)
    os.close(watched)
    try:
        while worker.poll() is None:
            try:
                time.sleep(0.2)  # and not `wait`, which KeyboardInterrupt, Ray's way of cancelling, does not wake
            except KeyboardInterrupt:
                worker.send_signal(signal.SIGTERM)
    finally:
        os.close(held)
    return f"status {worker.returncode}"
