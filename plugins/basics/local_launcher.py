"""The `local` launcher: one process per run on this machine, several at a time."""

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
from pathlib import Path
from threading import Event, Lock
from typing import IO, Any

from ...core.artefacts.files import user_fixable_error, write_text
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.training import Launcher
from ...core.reporting import LaunchResult, Reporter


@hookimpl
def launchers() -> list[Launcher]:
    return [Launcher("local", "one process per run on this machine", launch)]


def launch(runs: Sequence[Path], jobs: int, reporter: Reporter, options: object = None) -> list[LaunchResult]:
    """Train every run, at most `jobs` at a time; a failed process does not affect the others.

    On Ctrl-C every running process writes a checkpoint and stops; the remaining runs are not started.
    """
    processes = _WorkerProcesses(reporter)
    with ThreadPoolExecutor(max_workers=max(jobs, 1)) as pool:
        futures = [pool.submit(processes.train, run) for run in runs]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            processes.stop()
            return [future.result() for future in futures]


class _WorkerProcesses:
    """The worker processes of one launch."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._running: set[subprocess.Popen[str]] = set()
        self._warnings: set[str] = set()
        self._stopping = Event()
        self._lock = Lock()

    def train(self, run: Path) -> LaunchResult:
        """Train one run in a process, report its result and return it."""
        try:
            result = self._train(run)
        except OSError as error:
            result = LaunchResult(run, str(user_fixable_error(error, run) or error))
        self._reporter.run_finished(result)
        return result

    def _train(self, run: Path) -> LaunchResult:
        from ...core.manifests.run import LOG_FILE  # here: it loads pydantic, and plugins load for `--help`

        # standard error is kept beside the run only if the process fails unexpectedly
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log, _leash() as leash:
            process = self._start(run, log, leash)
            if process is None:
                return LaunchResult(run, None, interrupted=True)
            with process:  # closes both pipes on exit
                last_record = self._forward_records(run, process)
                status = process.wait()
            with self._lock:
                self._running.discard(process)
            event = last_record.get("event")
            log.seek(0)
            output = log.read()
            self._forward_warnings(output)
            if status == 0 and event == "finished":
                return LaunchResult(run, None)
            if event == "interrupted" or self._stopping.is_set():
                return LaunchResult(run, None, interrupted=True)
            if event == "error":
                return LaunchResult(run, str(last_record["message"]))
            return LaunchResult(run, _describe_crash(status, output, run / LOG_FILE))

    def _start(self, run: Path, log: IO[str], leash: int) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            command = [sys.executable, "-P", "-m", "expertctl.experts.training.worker", str(run)]
            process = subprocess.Popen(
                [*command, "--leash", str(leash)],
                pass_fds=(leash,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches it only once, through `stop`
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
            self._running.add(process)
            return process

    def _forward_records(self, run: Path, process: subprocess.Popen[str]) -> Mapping[str, Any]:
        """Forward the worker's records to the reporter and return the last one."""
        last_record: dict[str, Any] = {}
        assert process.stdout is not None
        for line in process.stdout:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # output of a library
            if not isinstance(record, dict):
                continue
            last_record = record
            if record.get("event") == "started":
                self._reporter.run_started(run, int(record["total_steps"]))
            if record.get("event") in ("started", "progress"):
                self._reporter.run_progressed(run, record)
        return last_record

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
