"""The `slurm` launcher: every run is a job of its own, by the commands `sbatch`, `squeue`, `sacct` and `scancel`."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ...core.errors import UserError
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least, check_positive
from ...core.hooks.training import Launcher
from ...core.process.scheduling import Job, JobState, Scheduler

COMMAND_TIMEOUT_S = 120.0
_STATES: Mapping[str, Literal["pending", "running", "ended", "lost", "cancelled"]] = {
    **dict.fromkeys(("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"), "pending"),
    **dict.fromkeys(("RESV_DEL_HOLD", "SPECIAL_EXIT", "POWER_UP_NODE", "EXPEDITING"), "pending"),
    **dict.fromkeys(("RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"), "running"),
    **dict.fromkeys(("PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "REVOKED"), "lost"),
    "CANCELLED": "cancelled",
}
"""Slurm's states; in the others, such as COMPLETED, FAILED and OUT_OF_MEMORY, a job has ended by itself."""


@dataclass(frozen=True)
class SlurmOptions:
    """Options of the `slurm` launcher; where one is not set, the cluster's default applies."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that nodes must have."""
    minutes: int | None = None
    """Time limit of a job; a run that takes longer goes on in further jobs."""
    nodes: int = 1
    """Nodes that train a run together."""
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    """CPU cores on each node."""
    mem: str | None = None
    """Memory on each node, such as 64G."""
    nproc: int | None = None
    """Processes on each node. Default: one per GPU, or one."""
    strategy: Literal["ddp", "fsdp", "hsdp", "ep"] = "ddp"
    """How several processes hold the model: each the whole of it, each a part of every tensor, each node in parts, or
    each some experts of a mixture and a part of every other tensor."""
    setup: tuple[str, ...] = ()
    """Lines of bash that a job runs first, such as `module load cuda`."""
    arguments: tuple[str, ...] = ()
    """Further arguments of sbatch, such as `--exclusive`."""
    restarts: int = 3
    """How often in a row a run is submitted again without a new checkpoint since the last time."""
    signal_seconds: int = 120
    """How long before its time limit a job is told to save its state."""
    poll_seconds: float = 15.0
    """Seconds between two looks at the queue."""

    def __post_init__(self) -> None:
        for name in ("minutes", "nodes", "gpus_per_node", "cpus_per_task", "nproc"):
            if (value := getattr(self, name)) is not None:
                check_at_least(name, value, 1)
        check_at_least("restarts", self.restarts, 0)
        check_at_least("signal_seconds", self.signal_seconds, 1)
        check_positive("poll_seconds", self.poll_seconds)

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return self.nproc or self.gpus_per_node or 1


@hookimpl
def launchers() -> list[Launcher]:
    return [Launcher("slurm", "a Slurm job per run", options=SlurmOptions, scheduler=scheduler)]


def scheduler(options: SlurmOptions) -> Scheduler:
    """Return the queue of the cluster; raises `UserError` where Slurm is not installed."""
    for command in ("sbatch", "squeue", "scancel"):
        if shutil.which(command) is None:
            raise UserError(f"launcher 'slurm' needs the command `{command}`; run this on a login node of the cluster")
    return Scheduler(partial(submit, options), states, cancel, options.restarts, options.poll_seconds)


def submit(options: SlurmOptions, job: Job) -> str:
    """Submit a job and return its id; raises `UserError` with the reason of sbatch."""
    output = _run(["sbatch", *sbatch_arguments(options, job)], stdin=job_script(options, job))
    job_id = output.strip().rpartition("\n")[2].partition(";")[0]  # ID or ID;CLUSTER
    if not job_id.isdecimal():
        raise UserError(f"sbatch printed {output.strip()!r:.80} and not the number of a job")
    return job_id


def sbatch_arguments(options: SlurmOptions, job: Job) -> list[str]:
    """Return the arguments of sbatch; it is not to requeue jobs itself, since the run would then be in two jobs' hands."""
    optional = {
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "time": options.minutes,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_task,
        "mem": options.mem,
    }
    return [
        "--parsable",
        "--no-requeue",
        f"--job-name={job.name}",
        f"--output={str(job.log).replace('%', '%%')}",
        "--open-mode=append",
        f"--nodes={options.nodes}",
        "--ntasks-per-node=1",
        f"--signal=B:USR1@{options.signal_seconds}",
        *(f"--{name}={value}" for name, value in optional.items() if value is not None),
        *options.arguments,
    ]


def job_script(options: SlurmOptions, job: Job) -> str:
    """Return the script of a job, whose shell becomes the worker, torchrun or srun, which then gets Slurm's signals."""
    return "\n".join(["#!/bin/bash", *options.setup, *_start_lines(options, job), ""])


def _start_lines(options: SlurmOptions, job: Job) -> Iterator[str]:
    if options.nodes == 1 and options.processes == 1:
        yield f"exec {shlex.join(job.command())}"
        return
    torchrun = [
        f"--nproc-per-node={options.processes}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
        f"--shutdown-timeout={options.signal_seconds}",
    ]
    if options.nodes == 1:
        yield f"exec {shlex.join(job.command('--standalone', *torchrun, strategy=options.strategy))}"
        return
    # torchrun reads the options that only a running job knows from these variables
    yield 'export PET_RDZV_ID="$SLURM_JOB_ID"'
    yield 'export PET_RDZV_ENDPOINT="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))"'
    torchrun += [f"--nnodes={options.nodes}", "--rdzv-backend=c10d"]
    cores = f"--cpus-per-task={options.cpus_per_task} " if options.cpus_per_task is not None else ""
    command = shlex.join(job.command(*torchrun, strategy=options.strategy))
    yield f"exec srun --ntasks-per-node=1 {cores}--kill-on-bad-exit=1 {command}"


def states(ids: Sequence[str]) -> Mapping[str, JobState]:
    """Return the states of jobs: from the queue, and for those that have left it from the accounts, if the cluster keeps any."""
    found: dict[str, JobState] = {}
    for command in (
        ["squeue", "--noheader", "--states=all", "--format=%i|%T|%N|%r"],
        ["sacct", "--allusers", "--allocations", "--noheader", "--parsable2", "--format=JobID,State,NodeList"],
    ):
        missing = [job_id for job_id in ids if job_id not in found]
        if missing and shutil.which(command[0]) is not None:
            try:
                found |= _parsed(_run([*command, f"--jobs={','.join(missing)}"]), missing)
            except UserError as error:
                if command[0] == "squeue" and "Invalid job id" not in str(error):
                    raise  # whereas a job that squeue has forgotten, or a cluster without accounts, is no error
    return found


def _parsed(output: str, ids: Sequence[str]) -> dict[str, JobState]:
    """Return the jobs of `ids` in lines ID|STATE|NODES or ID|STATE|NODES|REASON."""
    found = {}
    for line in output.splitlines():
        job_id, word, node, *reason = [*line.split("|"), "", ""][:4]
        if job_id in ids:
            name = re.split(r"[ +]", word)[0]  # such as `CANCELLED by 1000`
            state = _STATES.get(name, "ended")
            why = reason[0] if state == "pending" and reason[0] not in ("", "None") else None
            found[job_id] = JobState(state, node or None, why or name)
    return found


def cancel(ids: Sequence[str]) -> None:
    """Remove pending jobs; tell running ones to save their state and end."""
    _run(["scancel", "--state=PENDING", *ids])
    _run(["scancel", "--state=RUNNING", "--batch", "--signal=USR1", *ids])


def _run(command: Sequence[str], stdin: str = "") -> str:
    """Run a command of Slurm and return its output; raises `UserError` with its last line if it fails."""
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {COMMAND_TIMEOUT_S:g} seconds") from None
    if done.returncode != 0:
        lines = [line.removeprefix(f"{command[0]}: ") for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"{command[0]} failed: {'; '.join(lines[-2:]) or f'status {done.returncode}'}")
    return done.stdout
