"""What a worker reports: records that go to the reporter, its outcome, and its warnings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from ....core.reporting import Reporter


class WorkerRecords:
    """The JSON lines of one worker: forwards progress to the reporter and keeps the first outcome."""

    def __init__(self, run: Path, reporter: Reporter) -> None:
        self._run, self._reporter = run, reporter
        self.has_started = False
        self.outcome: Mapping[str, Any] = {}
        """The record with the event `finished`, `interrupted` or `error`; empty if there is none yet."""

    @property
    def event(self) -> str | None:
        return self.outcome.get("event")

    def receive(self, line: str) -> None:
        """Handle one line of the worker's output."""
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return  # output of a library
        if not isinstance(record, dict):
            return
        event = record.get("event")
        if event in ("finished", "interrupted", "error") and not self.outcome:
            self.outcome = record  # other processes may crash because of the first one's end
        if event == "started":
            self.has_started, self.outcome = True, {}  # a scheduler may start a stopped job again by itself
            self._reporter.run_started(self._run, int(record["total_steps"]))
        if event in ("started", "progress"):
            self._reporter.run_progressed(self._run, record)


class RecordsFile:
    """The records of a worker that writes them to a file; `read` handles the lines that are new."""

    def __init__(self, path: Path, records: WorkerRecords) -> None:
        self.path, self.records = path, records
        self._offset = 0

    def read(self) -> None:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return  # the job has not begun
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.decode(errors="replace").splitlines():
            self.records.receive(line)


class Warnings:
    """Forwards the warnings that workers print, each once for all runs."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._known: set[str] = set()
        self._lock = Lock()

    def forward(self, output: str) -> None:
        for line in output.splitlines():
            if line.startswith("Warning: "):
                with self._lock:
                    is_new = line not in self._known
                    self._known.add(line)
                if is_new:
                    self._reporter.say(line)


def last_line(output: str) -> str | None:
    """Return the last line of an output that is not empty."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else None
