"""Experiment trackers of a run, each in a process of its own: no error, hang or output of theirs reaches the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

from ..errors import Interrupted, UserError
from ..hooks.events import RunOutcome, TrackedRun, Tracker
from ..hooks.manager import installed_plugins
from ..hooks.options import parse_options

FINISH_SECONDS = 60.0
"""How long the end of a run waits for its trackers, all together."""

TrackerOptions = Mapping[str, Mapping[str, Any]]
"""Options of trackers, by name."""


def check_trackers(trackers: TrackerOptions) -> None:
    """Raise `UserError` for a tracker that is unknown, has wrong options, or needs a package that is missing."""
    for name, options in trackers.items():
        tracker = installed_plugins().offer(Tracker, name)
        parse_options(tracker.options, options, f"tracker '{name}'")
        if tracker.module is not None and find_spec(tracker.module) is None:
            install = f": pip install '{tracker.install}'" if tracker.install is not None else ""
            raise UserError(f"tracker '{name}' needs {tracker.module}, which is not installed{install}")


class Tracking:
    """The trackers of one run. Nothing waits for them but `finish`."""

    def __init__(self, trackers: TrackerOptions, run: TrackedRun) -> None:
        self.summary: dict[str, Any] = {}
        """Passed to `RunTracker.finish`."""
        self._processes = [
            _TrackerProcess(name, options, replace(run, store=run.store / name)) for name, options in trackers.items()
        ]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for process in self._processes:
            process.send("log", step, dict(metrics))

    def roll_back(self, step: int) -> None:
        for process in self._processes:
            process.send("roll_back", step)

    def finish(self, outcome: RunOutcome) -> None:
        for process in self._processes:
            process.send("finish", outcome, self.summary)
        deadline = time.monotonic() + FINISH_SECONDS
        for process in self._processes:
            process.wait(deadline)


@contextmanager
def tracking(trackers: TrackerOptions, run: TrackedRun) -> Iterator[Tracking]:
    """Yield the trackers of a run, which the outcome of the block finishes; `run.store` is the folder of all their files.

    Trackers that take longer than `FINISH_SECONDS` to end are killed. Their problems are lines on standard error.
    """
    started = Tracking(trackers, run)
    outcome: RunOutcome = "failed"
    try:
        yield started
        outcome = "finished"
    except (Interrupted, KeyboardInterrupt):
        outcome = "interrupted"
        raise
    finally:
        started.finish(outcome)


class _TrackerProcess:
    """The sending side of `tracker_process.py`; writes that the pipe has no room for are kept and repeated later."""

    def __init__(self, name: str, options: Mapping[str, Any], run: TrackedRun) -> None:
        self._subject = f"tracker '{name}' of {run.kind} '{run.name}'"
        self._unsent = bytearray()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            run.store.mkdir(parents=True, exist_ok=True)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "expertctl.core.tracking.tracker_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # Ctrl-C must not reach it before the run has ended
            )
        except OSError as error:
            self._warn(str(error))
            return
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)
        described = {**asdict(run), "folder": str(run.folder), "store": str(run.store)}
        self.send(name, dict(options), described, self._subject)

    def send(self, *message: Any) -> None:
        """Send a JSON line, as much as the process takes without waiting."""
        if self._process is None:
            return
        self._unsent += json.dumps(message, default=str).encode() + b"\n"  # YAML has dates
        try:
            del self._unsent[: os.write(self._pipe, self._unsent)]
        except BlockingIOError:
            pass  # it is slow, or hangs
        except BrokenPipeError:
            self._unsent.clear()  # it has ended, and has said why

    def wait(self, deadline: float) -> None:
        """Send the rest and wait until the process ends; at the deadline, kill it and what it started."""
        if self._process is None:
            return
        try:
            self._process.communicate(bytes(self._unsent), timeout=max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError, PermissionError):  # it has just ended
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._warn(
                f"it did not finish within {FINISH_SECONDS:g} seconds and was stopped; what it recorded may be incomplete"
            )
        else:
            if self._process.returncode:
                self._warn(f"its process ended with status {self._process.returncode}")

    def _warn(self, reason: str) -> None:
        print(f"Warning: {self._subject}: {reason}", file=sys.stderr)
