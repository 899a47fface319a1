"""The `local` launcher: every run in a process of its own on this machine, a few at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import IO, Any

from ...core.artefacts.files import mendable, write_text
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.training import Launcher, LaunchResult, RunReporter


@hookimpl
def launchers() -> list[Launcher]:
    return [Launcher("local", "one process for each run on this machine", launch)]


def launch(runs: Sequence[Path], jobs: int, reporter: RunReporter) -> list[LaunchResult]:
    """Train every run, at most `jobs` at a time; one that dies does not touch the others.

    On Ctrl-C every running process is asked to write a checkpoint and stop; those not begun stay as they are.
    """
    fleet = _Fleet(reporter)
    with ThreadPoolExecutor(max_workers=max(jobs, 1)) as pool:
        futures = [pool.submit(fleet.train, run) for run in runs]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            fleet.stop()
            return [future.result() for future in futures]


class _Fleet:
    """The processes of one launch."""

    def __init__(self, reporter: RunReporter) -> None:
        self._reporter = reporter
        self._running: set[subprocess.Popen[str]] = set()
        self._stopping = Event()
        self._lock = Lock()

    def train(self, run: Path) -> LaunchResult:
        """Train one run in a process and report how it ended."""
        try:
            result = self._train(run)
        except OSError as error:
            result = LaunchResult(run, str(mendable(error, run) or error))
        self._reporter.finished(result)
        return result

    def _train(self, run: Path) -> LaunchResult:
        from ...experts.runs.specification import (
            LOG_FILE,  # here, since it loads pydantic and plugins load for `--help`
        )

        # What it writes to standard error is kept beside the run only if the process dies of something unexpected.
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            process = self._start(run, log)
            if process is None:
                return LaunchResult(run, None, interrupted=True)
            with process:  # closes both pipes in the end
                last = self._follow(run, process)
                status = process.wait()
            with self._lock:
                self._running.discard(process)
            event = last.get("event")
            if status == 0 and event == "finished":
                return LaunchResult(run, None)
            if event == "interrupted" or self._stopping.is_set():
                return LaunchResult(run, None, interrupted=True)
            if event == "error":
                return LaunchResult(run, str(last["message"]))
            log.seek(0)
            return LaunchResult(run, _how_it_died(status, log.read(), run / LOG_FILE))

    def _start(self, run: Path, log: IO[str]) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "expertctl.experts.training.worker", str(run)],
                stdin=subprocess.PIPE,  # held open: its end tells the worker that we are gone
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C reaches it once, through `stop`
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
            self._running.add(process)
            return process

    def _follow(self, run: Path, process: subprocess.Popen[str]) -> Mapping[str, Any]:
        """Pass on what the worker tells and return its last record."""
        last: dict[str, Any] = {}
        assert process.stdout is not None
        for line in process.stdout:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # something a library printed
            if not isinstance(record, dict):
                continue
            last = record
            if record.get("event") == "started":
                self._reporter.started(run, int(record["total_steps"]))
            if record.get("event") in ("started", "progress"):
                self._reporter.progressed(run, record)
        return last

    def stop(self) -> None:
        """Ask every running process to save its state and end."""
        with self._lock:
            self._stopping.set()
            for process in self._running:
                process.send_signal(signal.SIGINT)


def _how_it_died(status: int, said: str, log: Path) -> str:
    """Return one line about a process that ended without a word, and keep what it wrote."""
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if not lines:
        return f"its process {how}: it said nothing"
    write_text(log, said)
    return f"its process {how}: {lines[-1]} (all of it in {log})"
