"""The process of one tracker: `python -m expertctl.core.tracking.tracker_process` reads what to record as JSON lines.

Each line is a list. The first one has the tracker's name, its options, the run, and the subject of warnings; the others
have a method of `RunTracker` and its arguments. If the lines end without `finish`, the process of the run has died.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from queue import SimpleQueue
from threading import Thread, Timer
from typing import Any

from ..errors import first_line
from ..hooks.events import RunTracker, TrackedRun, Tracker
from ..hooks.manager import installed_plugins
from ..hooks.options import parse_options

ORPHAN_SECONDS = 120.0
"""How long the process goes on after the run has closed its pipe; a living run ends it sooner."""


def main() -> None:
    """Record one run, and print one warning if that fails."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # clusters send them to all processes of a job
        signal.signal(number, signal.SIG_IGN)
    warnings = os.fdopen(os.dup(2), "w", encoding="utf-8")
    os.dup2(1, 2)  # what libraries print would mix with the output of the command
    name, options, run, subject = json.loads(sys.stdin.readline())
    messages: SimpleQueue[list[Any]] = SimpleQueue()
    Thread(target=_receive, args=(messages,), daemon=True).start()
    action = "open"
    try:
        tracker = _opened(name, options, run)
        while action != "finish":
            action, *arguments = messages.get()
            getattr(tracker, action)(*arguments)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        print(f"Warning: {subject}: {action} failed: {reason}; the run goes on without it", file=warnings, flush=True)
        os._exit(0)  # threads of its library may never end


def _opened(name: str, options: dict[str, Any], run: dict[str, Any]) -> RunTracker:
    tracker = installed_plugins().offer(Tracker, name)
    paths = {key: Path(run[key]) for key in ("folder", "store")}
    return tracker.open(TrackedRun(**{**run, **paths}), parse_options(tracker.options, options, f"tracker '{name}'"))


def _receive(messages: SimpleQueue[list[Any]]) -> None:
    for line in sys.stdin:
        if line.endswith("\n"):  # else the run died while it wrote
            messages.put(json.loads(line))
    timer = Timer(ORPHAN_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()
    messages.put(["finish", "failed", {}])


if __name__ == "__main__":
    main()
