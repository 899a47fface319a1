"""The processes of the `local` launcher: a worker for each run, or several that torchrun starts."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import IO

from ....core.artefacts.files import user_fixable_error, write_text
from ....core.manifests.run import LOG_FILE
from ....core.process.worker_command import WORKER_ENVIRONMENT, worker_command
from ....core.reporting import LaunchResult, Reporter
from ....experts.runs.jobs.worker_records import Warnings, WorkerRecords, last_line
from .capacity import memory_problems, shared_gpus
from .options import LocalOptions


def train_in_processes(
    runs: Sequence[Path], jobs: int, reporter: Reporter, options: LocalOptions
) -> list[LaunchResult]:
    """Train every run, at most `jobs` at a time; see `launch`."""
    jobs = max(min(jobs, len(runs)), 1)
    too_large, warning = memory_problems(runs, jobs, options)
    if warning is not None:
        reporter.say(f"Warning: {warning}")
    processes = _WorkerProcesses(reporter, options, shared_gpus(runs, jobs, options))
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        futures = [pool.submit(processes.train, run, too_large.get(run)) for run in runs]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            processes.stop()
            return [future.result() for future in futures]


class _WorkerProcesses:
    """The worker processes of one launch."""

    def __init__(self, reporter: Reporter, options: LocalOptions, gpu_shares: Sequence[str | None]) -> None:
        self._reporter, self._options = reporter, options
        self._warnings = Warnings(reporter)
        self._running: set[subprocess.Popen[str]] = set()
        self._free_gpus: SimpleQueue[str | None] = SimpleQueue()
        for share in gpu_shares:
            self._free_gpus.put(share)
        self._stopping = Event()
        self._lock = Lock()

    def train(self, run: Path, error: str | None = None) -> LaunchResult:
        """Train one run, report its result and return it; with `error`, it is not started.

        Several processes are started again if one of them crashes.
        """
        gpus = self._free_gpus.get()
        try:
            result = LaunchResult(run, error) if error is not None else self._train_to_end(run, gpus)
        finally:
            self._free_gpus.put(gpus)
        self._reporter.run_finished(result)
        return result

    def _train_to_end(self, run: Path, gpus: str | None) -> LaunchResult:
        try:
            for left in range(self._options.restarts if self._options.nproc > 1 else 0, -1, -1):
                result, has_crashed = self._train(run, gpus)
                if not has_crashed or not left:
                    break
                self._reporter.say(f"{run.name}: {result.error}; starting again from the last checkpoint")
        except OSError as error:
            return LaunchResult(run, str(user_fixable_error(error, run) or error))
        return result

    def _train(self, run: Path, gpus: str | None) -> tuple[LaunchResult, bool]:
        """Train one run once; return its result, and whether its processes crashed."""
        # standard error is kept beside the run only if the process fails unexpectedly
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log, _leash() as leash:
            process = self._start(run, gpus, log, leash)
            if process is None:
                return LaunchResult(run, None, interrupted=True), False
            with process:  # closes both pipes on exit
                records = WorkerRecords(run, self._reporter)
                assert process.stdout is not None
                for line in process.stdout:
                    records.receive(line)
                status = process.wait()
            with self._lock:
                self._running.discard(process)
            log.seek(0)
            output = log.read()
            self._warnings.forward(output)
            if status == 0 and records.event == "finished":
                return LaunchResult(run, None), False
            if records.event == "interrupted" or self._stopping.is_set():
                return LaunchResult(run, None, interrupted=True), False
            if records.event == "error":
                return LaunchResult(run, str(records.outcome["message"])), False
            return LaunchResult(run, _describe_crash(status, output, run / LOG_FILE)), True

    def _start(self, run: Path, gpus: str | None, log: IO[str], leash: int) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            together = self._options.nproc > 1
            process = subprocess.Popen(
                _command(run, self._options, leash),
                pass_fds=(leash,),
                stdin=leash if together else subprocess.DEVNULL,  # torchrun passes only standard streams on
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches it only once, through `stop`
                env=os.environ | WORKER_ENVIRONMENT | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}),
            )
            self._running.add(process)
            return process

    def stop(self) -> None:
        """Signal every running process to save its state and exit."""
        with self._lock:
            self._stopping.set()
            for process in self._running:
                process.send_signal(signal.SIGINT)


def _command(run: Path, options: LocalOptions, leash: int) -> list[str]:
    """Return the command of a run's worker, or of torchrun, which starts several of them; those are leashed by stdin."""
    limit = () if options.minutes is None else ("--time-limit", f"{60 * options.minutes:g}")
    if options.nproc == 1:
        return worker_command(run, "--leash", str(leash), *limit)
    torchrun = ("--standalone", f"--nproc-per-node={options.nproc}")
    return worker_command(run, "--strategy", options.strategy, "--leash", "0", *limit, torchrun=torchrun)


@contextmanager
def _leash() -> Iterator[int]:
    """Yield the end of a pipe for a worker to watch; the other end closes when this process ends for any reason."""
    watched, held = os.pipe()
    try:
        yield watched
    finally:
        os.close(watched)
        os.close(held)


def _describe_crash(status: int, output: str, log: Path) -> str:
    """Return a one-line error for a crashed process and write its standard error to `log`."""
    cause = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
    line = last_line(output)
    if line is None:
        return f"its process {cause} without output"
    write_text(log, output)
    return f"its process {cause}: {line} (full output in {log})"
