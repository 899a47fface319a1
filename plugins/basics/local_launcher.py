"""The `local` launcher: runs on this machine, several at a time, each in one process or in several that torchrun starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import IO, Any, Literal

from ...core.artefacts.files import user_fixable_error, write_text
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least
from ...core.hooks.training import Launcher
from ...core.reporting import LaunchResult, Reporter


@dataclass(frozen=True)
class LocalOptions:
    """Options of the `local` launcher."""

    nproc: int = 1
    """Processes that train a run together, on a GPU each if there are GPUs."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several processes hold the model: each the whole of it, or each a part of every tensor."""
    restarts: int = 3
    """How often a run of several processes is started again from its last checkpoint after a crash."""

    def __post_init__(self) -> None:
        check_at_least("nproc", self.nproc, 1)
        check_at_least("restarts", self.restarts, 0)


@hookimpl
def launchers() -> list[Launcher]:
    return [Launcher("local", "one or several processes per run on this machine", launch, LocalOptions)]


def launch(runs: Sequence[Path], jobs: int, reporter: Reporter, options: Any = None) -> list[LaunchResult]:
    """Train every run, at most `jobs` at a time; a failed process does not affect the others.

    On Ctrl-C every running process writes a checkpoint and stops; the remaining runs are not started.
    """
    processes = _WorkerProcesses(reporter, options or LocalOptions())
    with ThreadPoolExecutor(max_workers=max(jobs, 1)) as pool:
        futures = [pool.submit(processes.train, run) for run in runs]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            processes.stop()
            return [future.result() for future in futures]


class _WorkerProcesses:
    """The worker processes of one launch."""

    def __init__(self, reporter: Reporter, options: LocalOptions) -> None:
        self._reporter, self._options = reporter, options
        self._running: set[subprocess.Popen[str]] = set()
        self._warnings: set[str] = set()
        self._stopping = Event()
        self._lock = Lock()

    def train(self, run: Path) -> LaunchResult:
        """Train one run, report its result and return it; several processes are started again if one of them crashes."""
        try:
            for left in range(self._options.restarts if self._options.nproc > 1 else 0, -1, -1):
                result, has_crashed = self._train(run)
                if not has_crashed or not left:
                    break
                self._reporter.say(f"{run.name}: {result.error}; starting again from the last checkpoint")
        except OSError as error:
            result = LaunchResult(run, str(user_fixable_error(error, run) or error))
        self._reporter.run_finished(result)
        return result

    def _train(self, run: Path) -> tuple[LaunchResult, bool]:
        """Train one run once; return its result, and whether its processes crashed."""
        from ...core.manifests.run import LOG_FILE  # here: it loads pydantic, and plugins load for `--help`

        # standard error is kept beside the run only if the process fails unexpectedly
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log, _leash() as leash:
            process = self._start(run, log, leash)
            if process is None:
                return LaunchResult(run, None, interrupted=True), False
            with process:  # closes both pipes on exit
                outcome = self._forward_records(run, process)
                status = process.wait()
            with self._lock:
                self._running.discard(process)
            event = outcome.get("event")
            log.seek(0)
            output = log.read()
            self._forward_warnings(output)
            if status == 0 and event == "finished":
                return LaunchResult(run, None), False
            if event == "interrupted" or self._stopping.is_set():
                return LaunchResult(run, None, interrupted=True), False
            if event == "error":
                return LaunchResult(run, str(outcome["message"])), False
            return LaunchResult(run, _describe_crash(status, output, run / LOG_FILE)), True

    def _start(self, run: Path, log: IO[str], leash: int) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            together = self._options.nproc > 1
            process = subprocess.Popen(
                _together(run, self._options) if together else [*_WORKER, str(run), "--leash", str(leash)],
                pass_fds=(leash,),
                stdin=leash if together else subprocess.DEVNULL,  # torchrun passes only standard streams on
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches it only once, through `stop`
                env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"},
            )
            self._running.add(process)
            return process

    def _forward_records(self, run: Path, process: subprocess.Popen[str]) -> Mapping[str, Any]:
        """Forward the worker's records to the reporter and return the first that tells how the run ended."""
        outcome: dict[str, Any] = {}
        assert process.stdout is not None
        for line in process.stdout:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # output of a library
            if not isinstance(record, dict):
                continue
            if record.get("event") in ("finished", "interrupted", "error") and not outcome:
                outcome = record  # other processes may crash because of the first one's end
            if record.get("event") == "started":
                self._reporter.run_started(run, int(record["total_steps"]))
            if record.get("event") in ("started", "progress"):
                self._reporter.run_progressed(run, record)
        return outcome

    def _forward_warnings(self, output: str) -> None:
        """Forward the warnings that a worker printed, each once for all runs."""
        for line in output.splitlines():
            if line.startswith("Warning: "):
                with self._lock:
                    is_new = line not in self._warnings
                    self._warnings.add(line)
                if is_new:
                    self._reporter.say(line)

    def stop(self) -> None:
        """Signal every running process to save its state and exit."""
        with self._lock:
            self._stopping.set()
            for process in self._running:
                process.send_signal(signal.SIGINT)


_WORKER = (sys.executable, "-P", "-m", "expertctl.experts.training.worker")


def _together(run: Path, options: LocalOptions) -> list[str]:
    """Return the command by which torchrun starts the processes of a run.

    torchrun itself never starts them again: with gloo, the new processes can read the old ones' addresses.
    """
    torchrun = (sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--max-restarts=0")
    worker = ("-m", _WORKER[-1], str(run), "--strategy", options.strategy, "--leash", "0")
    return [*torchrun, f"--nproc-per-node={options.nproc}", *worker]


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
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not lines:
        return f"its process {cause} without output"
    write_text(log, output)
    return f"its process {cause}: {lines[-1]} (full output in {log})"
