"""An installed plugin with the tracker `recording`, which writes down what it is called with and misbehaves on request."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

SOURCE = """
import json, os, sys, time
from dataclasses import asdict, dataclass
from expertctl import RunTracker, TrackedRun, Tracker, hookimpl

@dataclass(frozen=True)
class Options:
    raises: str = ""
    hangs: str = ""
    aborts: str = ""

class Recording(RunTracker):
    def __init__(self, run, options):
        self.run, self.options = run, options
        self.note("open", {**asdict(run), "folder": str(run.folder), "store": str(run.store)}, os.getpid())

    def note(self, action, *arguments):
        print("chatter"), print("chatter", file=sys.stderr)
        with (self.run.store / "calls.jsonl").open("a") as file:
            file.write(json.dumps([action, *arguments]) + "\\n")
        if self.options.raises == action:
            raise ConnectionError(f"no route for {action}")
        if self.options.aborts == action:
            os.abort()
        while self.options.hangs == action:
            time.sleep(60)

    def log(self, step, metrics):
        self.note("log", step, dict(metrics))

    def roll_back(self, step):
        self.note("roll_back", step)

    def finish(self, outcome, summary):
        self.note("finish", outcome, dict(summary))

@hookimpl
def trackers():
    return [Tracker("recording", "for tests", Recording, Options), Tracker("second", "for tests", Recording, Options)]
"""


def install_recording_trackers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of trackers find the trackers `recording` and `second`."""
    info = folder / "recording-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "plugin_of_recording.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: recording\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[expertctl]\nrecording = plugin_of_recording\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("EXPERTCTL_PLUGINS", "recording")


def calls(store: Path, tracker: str = "recording") -> list[Any]:
    """Return the calls of all runs below `.tracking`: lists of an action and its arguments; none if there are none."""
    file = store / tracker / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
